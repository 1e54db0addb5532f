"""SparseWindowCache under generate: what each model class writes with it."""

import copy

import pytest
import torch
from tiny_models import CONFIGS, cache_argument, generate, make, prompt

from tokcore.algorithms.alisa import dense, h2o, local_window, streaming_llm, strided, tova
from tokcore.integrations.transformers import SparseWindowCache, enable

every_class = pytest.mark.parametrize("name", CONFIGS)


def sparse_layers(cache):
    return [layer.state for layer in cache.layers if hasattr(layer, "state")]


# ---- ratio 1 is sdpa ----------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
def test_ratio_one_writes_what_sdpa_writes(name, how):
    model, ids = make(name), prompt(19, batch=2)
    torch.manual_seed(5)
    want = generate(model, ids, **how)
    with enable(model):
        torch.manual_seed(5)
        assert torch.equal(generate(model, ids, **how), want)  # another cache: as before
        for options in ({"ratio": 1.0}, {"policy": dense()}):
            torch.manual_seed(5)
            got = generate(model, ids, SparseWindowCache(model.config, **options), **how)
            assert torch.equal(got, want)
    assert model.config._attn_implementation == "sdpa"


@every_class
def test_ratio_one_gives_the_logits_of_sdpa(name):
    model, ids = make(name), prompt(40, batch=2)
    argument = cache_argument(model)
    want = model(ids).logits
    with enable(model), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want)
        cache = SparseWindowCache(model.config, ratio=1.0)
        parts = [model(ids[:, :13], **{argument: cache}).logits]
        parts += [model(ids[:, 13:30], **{argument: cache}).logits]
        parts += [model(ids[:, t : t + 1], **{argument: cache}).logits for t in range(30, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), want)


# ---- what is dropped changes nothing ------------------------------------------------------------


@every_class
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_evicting_writes_what_keeping_all_writes(name, ratio):
    model, ids = make(name), prompt(17)
    plain = generate(model, ids)
    windows = (None, 4, 8) if name == "llama" else (4,)
    with enable(model):
        for window in windows:
            for shared in (True, False):
                options = {"ratio": ratio, "window": window, "shared": shared}
                caches = [SparseWindowCache(model.config, evict=e, **options) for e in (1, 0)]
                got, want = (generate(model, ids, cache) for cache in caches)
                assert torch.equal(got, want)
                for dropping, keeping in zip(*map(sparse_layers, caches), strict=True):
                    assert int(keeping.count.max()) == 40
                    if window:
                        assert int(dropping.count.max()) < 40
    if ratio == 0.2:
        assert not torch.equal(got, plain)  # or nothing was sparse


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_evict_what_they_may(how):
    model, ids = make("llama"), prompt(17, batch=2)
    with enable(model):
        for window in (None, 4):
            caches = [
                SparseWindowCache(model.config, ratio=0.3, window=window, evict=e) for e in (1, 0)
            ]
            got, want = (generate(model, ids, cache, **how) for cache in caches)
            assert torch.equal(got, want)


# ---- padding, chunks, turns ---------------------------------------------------------------------


def padded(lengths, seed=3):
    longest = max(lengths)
    ids = prompt(longest, batch=len(lengths), seed=seed)
    mask = torch.ones_like(ids)
    for b, length in enumerate(lengths):
        ids[b, : longest - length] = mask[b, : longest - length] = 0
    return ids, mask


@every_class
def test_a_padded_batch_writes_what_each_prompt_writes(name):
    model = make(name)
    ids, mask = padded([21, 9, 14])
    with enable(model):
        for window in (4, None):
            options = {"ratio": 0.3, "window": window}
            got = generate(model, ids, SparseWindowCache(model.config, **options), mask)
            for b, length in enumerate(mask.sum(1).tolist()):
                alone = ids[b : b + 1, -length:]
                want = generate(model, alone, SparseWindowCache(model.config, **options))
                assert torch.equal(got[b, ids.shape[1] :], want[0, length:])


@every_class
def test_a_prompt_in_chunks_gives_the_logits_of_one(name):
    model, ids = make(name), prompt(50, batch=2)
    argument = cache_argument(model)
    results = []
    with enable(model), torch.no_grad():
        for chunks in ((40,), (16, 24), (3, 17, 20)):
            cache, start = SparseWindowCache(model.config, ratio=0.3, window=8), 0
            parts = []
            for size in (*chunks, *[1] * 10):
                part = model(ids[:, start : start + size], **{argument: cache})
                parts.append(part.logits)
                start += size
            results.append(torch.cat(parts, 1))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_generate_prefills_in_chunks():
    model, ids = make("llama"), prompt(24)
    with enable(model):
        want = generate(model, ids, SparseWindowCache(model.config, ratio=0.3))
        cache = SparseWindowCache(model.config, ratio=0.3)
        assert torch.equal(generate(model, ids, cache, prefill_chunk_size=8), want)


@every_class
def test_a_further_turn_continues_from_the_logical_length(name):
    """Two turns of generate equal one loop over the same tokens, positions included."""
    model, ids = make(name), prompt(15)
    argument = cache_argument(model)
    with enable(model), torch.no_grad():
        cache = SparseWindowCache(model.config, ratio=0.3, window=4)
        first = generate(model, ids, cache, new=20)
        assert cache.get_seq_length() == 34
        second = torch.cat([first, prompt(6, seed=9)], 1)
        got = generate(model, second, cache, new=8)
        assert cache.get_seq_length() == 48
        loop = SparseWindowCache(model.config, ratio=0.3, window=4)
        model(ids, **{argument: loop})
        for t in range(15, 34):
            model(first[:, t : t + 1], **{argument: loop})
        logits = model(second[:, 34:], **{argument: loop}).logits
        for t in range(8):
            token = logits[:, -1].argmax(-1, keepdim=True)
            assert int(token) == int(got[0, 41 + t])
            logits = model(token, **{argument: loop}).logits


def test_turns_of_a_padded_batch_write_what_each_writes_alone():
    model = make("llama")
    ids, mask = padded([12, 7])
    more, more_mask = padded([3, 8], seed=4)
    options = {"ratio": 0.4, "window": 6}
    with enable(model):
        cache = SparseWindowCache(model.config, **options)
        first = generate(model, ids, cache, mask, new=10)
        grown = torch.cat([mask, torch.ones(2, 10).long(), more_mask], 1)
        got = generate(model, torch.cat([first, more], 1), cache, grown, new=10)
        for b in range(2):
            alone = SparseWindowCache(model.config, **options)
            own = generate(model, ids[b : b + 1, mask[b] == 1], alone, new=10)
            own = torch.cat([own, more[b : b + 1, more_mask[b] == 1]], 1)
            want = generate(model, own, alone, new=10)
            assert torch.equal(got[b, -10:], want[0, -10:])


def test_rows_of_all_padding_leave_the_others_alone():
    model = make("llama")
    ids, mask = padded([12, 0])
    with enable(model):
        got = generate(model, ids, SparseWindowCache(model.config, ratio=0.4), mask)
        want = generate(model, ids[:1], SparseWindowCache(model.config, ratio=0.4))
    assert torch.equal(got[0], want[0])


# ---- options ------------------------------------------------------------------------------------


def test_int8_stays_within_quantisation():
    """Of each logit, against keys and values kept whole; weights that do not amplify it."""
    model, ids = make("llama", torch.float32, initializer_range=0.05), prompt(60)
    argument, logits = cache_argument(model), []
    with enable(model), torch.no_grad():
        for int8 in (True, False):
            cache = SparseWindowCache(model.config, policy=dense(), int8=int8)
            parts = [model(ids[:, :40], **{argument: cache}).logits]
            parts += [model(ids[:, t : t + 1], **{argument: cache}).logits for t in range(40, 60)]
            logits.append(torch.cat(parts, 1))
    # half a step of 1/255 of a token's range in keys and in values, relative, in each of 2 layers
    error = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    assert 0 < error < 4 / 255


def test_autocast_is_as_near_as_with_sdpa():
    model, ids = make("llama", torch.float32, initializer_range=0.1), prompt(30, batch=2)
    argument = cache_argument(model)
    want = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        stock = model(ids).logits
        with enable(model):
            cache = SparseWindowCache(model.config, ratio=1.0)
            parts = [model(ids[:, :20], **{argument: cache}).logits]
            parts += [model(ids[:, t : t + 1], **{argument: cache}).logits for t in range(20, 30)]
    errors = [(x - want).abs().max() for x in (torch.cat(parts, 1), stock)]
    assert sparse_layers(cache)[0].key.dtype == torch.bfloat16
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(
    "policy",
    [h2o(4, 4), tova(8), streaming_llm(2, 6), local_window(0.3), strided(0.4)],
    ids=["h2o", "tova", "streaming_llm", "local_window", "strided"],
)
def test_every_policy_generates(policy):
    model = make("llama")
    ids, mask = padded([20, 11])
    with enable(model):
        got = generate(model, ids, SparseWindowCache(model.config, policy=policy), mask, new=70)
        for b, length in enumerate((20, 11)):
            cache = SparseWindowCache(model.config, policy=policy)
            want = generate(model, ids[b : b + 1, -length:], cache, new=70)
            assert torch.equal(got[b, 20:], want[0, length:])
        assert int(sparse_layers(cache)[0].count.max()) < 81


def test_layers_have_their_own_ratio_and_the_first_may_be_dense():
    model, ids = make("llama"), prompt(30)
    with enable(model):
        cache = SparseWindowCache(model.config, ratio=[0.5, 0.1], window=4)
        generate(model, ids, cache)
        assert [int(s.selected) for s in sparse_layers(cache)] == [26, 6]
        cache = SparseWindowCache(model.config, ratio=0.1, window=4, dense_layers=1)
        generate(model, ids, cache)
        first, second = sparse_layers(cache)
        assert first.policy.is_dense
        assert int(first.count) == 53 > int(second.count)
        cache = SparseWindowCache(model.config, budget=10, window=4, sinks=2, reselect_every=4)
        generate(model, ids, cache)
        assert all(10 <= int(s.selected) <= 13 for s in sparse_layers(cache))


def test_a_cache_is_copied_reset_and_reused_for_another_batch():
    model, ids = make("llama"), prompt(20, batch=2)
    argument = cache_argument(model)
    with enable(model), torch.no_grad():
        shared_prefix = SparseWindowCache(model.config, ratio=0.4, window=4)
        model(ids[:1, :15], **{argument: shared_prefix})
        fresh = SparseWindowCache(model.config, ratio=0.4, window=4)
        model(ids[:1, :15], **{argument: fresh})
        want = generate(model, ids[:1], fresh)
        for _ in range(2):
            assert torch.equal(generate(model, ids[:1], copy.deepcopy(shared_prefix)), want)
        fresh.reset()
        assert fresh.get_seq_length() == 0
        both = generate(model, ids, fresh)
        assert torch.equal(
            both, generate(model, ids, SparseWindowCache(model.config, ratio=0.4, window=4))
        )


def test_rows_of_the_cache_are_repeated_and_selected():
    model, ids = make("llama"), prompt(20, batch=2)
    argument = cache_argument(model)
    rows = torch.tensor([1, 1, 0, 0])
    with enable(model), torch.no_grad():
        cache = SparseWindowCache(model.config, ratio=0.3, window=4)
        other = SparseWindowCache(model.config, ratio=0.3, window=4)
        model(ids, **{argument: cache})
        model(ids[rows], **{argument: other})
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 3, 0, 1]))
        for t in range(6):
            step = prompt(1, batch=2, seed=t)[rows]
            want = model(step, **{argument: other}).logits
            assert torch.equal(model(step, **{argument: cache}).logits, want)
        cache.batch_select_indices(torch.tensor([3]))
        step = prompt(1, seed=7)
        want = model(step.expand(4, 1), **{argument: other}).logits[3:]
        torch.testing.assert_close(model(step, **{argument: cache}).logits, want)


def test_memory_is_less_than_all_tokens_take():
    model, ids = make("llama", torch.float32), prompt(150)
    with enable(model):
        sizes = []
        for ratio in (0.1, 1.0):
            cache = SparseWindowCache(model.config, ratio=ratio, window=8)
            generate(model, ids, cache, new=20)
            sizes.append(cache.nbytes)
    assert sizes[0] < sizes[1]
