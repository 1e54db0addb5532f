"""Plans of ALISA's schedule, and tokens to run them on, for its tests."""

import torch
from hypothesis import strategies as st

from tokcore.algorithms.alisa import Plan, TwoTierStore, half_budget

SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def plans(draw, most=12):
    p1 = draw(st.integers(0, most))
    p2 = draw(st.integers(p1, most + 2))
    return Plan(draw(SHARES), draw(SHARES), p1, p2)


def half(ratio):
    return lambda n: half_budget(n, ratio)


HEADS, DIM, WIDTH = 2, 4, 6


def layer(inputs, positions):
    """Key and value (N, Hkv, D) of layer inputs, elementwise: a token's bits are its own."""
    shift = torch.arange(2 * HEADS * DIM, device=inputs.device, dtype=inputs.dtype)
    rotated = torch.cos(positions.to(inputs.dtype)[:, None] * 0.1 + shift)
    made = (inputs.repeat(1, 3)[:, : 2 * HEADS * DIM] * rotated).view(-1, 2, HEADS, DIM)
    return made[:, 0], made[:, 1]


class Everything:
    """Inputs, keys and values of B sequences; NaN where there is no token."""

    def __init__(self, batch, length, dtype=torch.float32, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(batch, length, WIDTH, generator=generator)
        self.inputs = inputs.to(device, dtype)
        positions = torch.arange(length, device=device).repeat(batch)
        made = layer(self.inputs.flatten(0, 1), positions)
        self.key, self.value = (
            x.view(batch, length, HEADS, DIM).transpose(1, 2).contiguous() for x in made
        )

    def new(self, starts, ends):
        """What ``append`` takes for positions [start, end) of each sequence, padded on the left."""
        counts = [e - s for s, e in zip(starts, ends, strict=True)]
        batch, most = len(starts), max(counts)
        key = self.key.new_full((batch, HEADS, most, DIM), torch.nan)
        value, inputs = key.clone(), key.new_full((batch, most, WIDTH), torch.nan)
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end > start:
                key[b, :, start - end :] = self.key[b, :, start:end]
                value[b, :, start - end :] = self.value[b, :, start:end]
                inputs[b, start - end :] = self.inputs[b, start:end]
        return {"key": key, "value": value, "inputs": inputs, "valid": counts}

    def at(self, index, count):
        """(B, Hkv, M, D) key and value of the listed tokens, 0 from count on; and for a store's."""
        lists, device = index.shape[1], index.device
        kept = torch.arange(index.shape[2], device=device) < count[:, :, None]
        heads = torch.arange(HEADS) if lists > 1 else torch.zeros(HEADS, dtype=torch.int64)
        rows = index.clamp(min=0).long()[:, heads, :, None].expand(-1, -1, -1, DIM)
        kept = kept[:, heads, :, None]
        return kept, *(torch.where(kept, x.gather(2, rows), 0) for x in (self.key, self.value))


def selection(lengths, budget, lists, generator):
    """Random globals before the local window, an own list for each of `lists`."""
    budgets = [budget(n) for n in lengths]
    most = max(local + top for local, top in budgets)
    index = torch.full((len(lengths), lists, most), -1, dtype=torch.int32)
    count = torch.zeros(len(lengths), lists, dtype=torch.int32)
    for b, (n, (local, top)) in enumerate(zip(lengths, budgets, strict=True)):
        for s in range(lists):
            older = torch.randperm(n - local, generator=generator)[:top].sort().values
            chosen = torch.cat([older, torch.arange(n - local, n)])
            index[b, s, : len(chosen)], count[b, s] = chosen, len(chosen)
    return index, count


def attention(query, key, value, kept):
    """Plain decode attention of (B, Hq, D) over packed tokens, two query heads a KV head."""
    query = query.unflatten(1, (HEADS, -1))
    scores = (query @ key.transpose(-1, -2)).masked_fill(~kept[..., 0][:, :, None], -torch.inf)
    return (scores.softmax(-1) @ value).flatten(1, 2)


def assert_equal_to_one_tier(store, tokens, prompts, count, budget, seed=0, check=None):
    """Prompt and `count` steps of random selections, each compared in bits. -> phases seen."""
    generator = torch.Generator().manual_seed(seed)
    lengths, phases = [0] * len(prompts), set()
    for step in range(count + 1):
        ends = list(prompts) if step == 0 else [n + 1 for n in lengths]
        store.append(**tokens.new(lengths, ends))
        lengths = ends
        assert store.lengths == lengths
        chosen = selection(lengths, budget, store.lists, generator)
        index, count_ = (x.to(store.key.device) for x in chosen)
        kept, key, value = tokens.at(index, count_)
        found = store.gather(index, count_)
        assert torch.equal(torch.where(kept, found.key, 0), key), step
        assert torch.equal(torch.where(kept, found.value, 0), value), step
        query = torch.randn(len(prompts), 2 * HEADS, DIM, generator=generator).to(key)
        ours = attention(query, torch.where(kept, found.key, 0), found.value, kept)
        assert torch.equal(ours, attention(query, key, torch.where(kept, value, found.value), kept))
        phases |= set(store.phases)
        if check:
            check(step, index, count_)
    return phases


def store_of(plan, prompts, count, budget, **options):
    kind = {"kv_heads": HEADS, "head_dim": DIM, "recompute": layer, "input_dim": WIDTH}
    return TwoTierStore(plan, prompts, count, budget, **(kind | options))
