"""ALISA and six relatives under one model: what a part of the KV cache costs in perplexity.

    python examples/alisa.py                               # some minutes on two cores
    python examples/alisa.py --quick                       # seconds: does everything run?
    python examples/alisa.py --policy alisa h2o --sparsity 0.5 0.8 0.9
    python examples/alisa.py --model DIR_OR_ID --prompt-file prompt.txt --policy alisa
                                                           # your own: streams its answer

The miniature is a Llama trained on CPython's documentation. Each policy then reads held-out pages
token by token, every step with the cache that the policy leaves it, so that the perplexity is that
of decoding, not of a mask laid over a prompt.

Expect the dense model's perplexity about 40 % below that of its own local window at 80 % sparsity,
and none of the policies near it. The miniature looks back in order to copy, at tokens that no step
has read before, and that is what past attention cannot foresee: docs/algorithms/alisa.md.
"""

import argparse
import json
import math
import random
import sys
import time
import warnings
from pathlib import Path

import documentation
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from preference_data import train_tokenizer
from streamed import stream
from tqdm import tqdm

from tokcore.algorithms.alisa import alisa, dense, h2o, local_window, streaming_llm, strided, tova
from tokcore.integrations.transformers import SparseWindowCache, enable

# Its new name, `cache`, is unknown to the older ones that the cache works with.
warnings.filterwarnings("ignore", message=".*`past_key_values` is deprecated")

# The miniature
VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS, KV_HEADS = 2048, 256, 128, 2, 4, 2
COPY_STEPS, COPY_BATCH, COPY_LENGTH = 500, 32, 64  # before the prose: see documentation.copies
STEPS, BATCH, LR = 400, 16, 3e-3
PROMPT, ROWS = 32, 32  # tokens before the first that is predicted, and held-out rows
WINDOW = 16  # steps whose weights ALISA sums
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = {
    "alisa": lambda ratio, n: alisa(ratio, window=WINDOW),
    "h2o": lambda ratio, n: h2o(*halves(ratio, n)),
    "tova": lambda ratio, n: tova(sum(halves(ratio, n))),
    "streaming_llm": lambda ratio, n: streaming_llm(4, max(1, sum(halves(ratio, n)) - 4)),
    "local_window": lambda ratio, n: local_window(ratio),
    "strided": lambda ratio, n: strided(ratio),
}


def halves(ratio, n):
    """Of the policies with a fixed number of tokens: what the ratio is at half of the length."""
    half = max(1, round(n * ratio / 4))
    return half, half


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a run of seconds")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("outputs/alisa"), help="figure, metrics.json, model")
    add("--policy", nargs="+", choices=sorted(POLICIES), default=list(POLICIES))
    add("--sparsity", nargs="+", type=float, help="1 - ratio; default 0.5 0.8 0.9, quick 0.8")
    add("--steps", type=int, help=f"of training; default {STEPS}")
    add("--model", help="folder or hub name of a causal language model")
    add("--prompt-file", type=Path, help="text that the model is to continue")
    add("--new-tokens", type=int, default=200, help="of the model's continuation")
    args = parser.parse_args()
    if bool(args.model) != bool(args.prompt_file):
        parser.error("--model and --prompt-file belong together")
    args.sparsity = args.sparsity or ([0.8] if args.quick else [0.5, 0.8, 0.9])
    if not all(0 <= s < 1 for s in args.sparsity):
        parser.error(f"--sparsity: must lie in [0, 1), got {args.sparsity}")
    args.steps = args.steps or (6 if args.quick else STEPS)
    return args


# --- the miniature --------------------------------------------------------------------------------


def miniature(args):
    """A model trained on nine tenths of the pages, its tokenizer, rows of the others."""
    texts = documentation.pages(60 if args.quick else None)
    train, held_out = documentation.split(texts, args.seed)
    tokenizer = train_tokenizer(train, VOCABULARY)
    train, held_out = (
        [ids for ids in tokenizer(part)["input_ids"] if len(ids) > LENGTH]
        for part in (train, held_out)
    )
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).to(DEVICE)
    print(f"{sum(map(len, train))} tokens to train on, {len(held_out)} pages held out")
    fit(model, train, args)
    held_out = torch.tensor([ids[: LENGTH + 1] for ids in held_out[: 2 if args.quick else ROWS]])
    return model.eval().requires_grad_(False), tokenizer, held_out.to(DEVICE)


def fit(model, train, args):
    """First copies of random tokens, short rows; then the prose."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.1)
    copy_steps = 3 if args.quick else COPY_STEPS
    bar = tqdm(range(copy_steps + args.steps), desc="training", file=sys.stdout, mininterval=5)
    for step in bar:
        done = max(0, step - copy_steps) / args.steps
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 30) * (0.525 + 0.475 * math.cos(math.pi * done))
        first = 0  # position from which on tokens are predicted
        if step < copy_steps:
            ids, first = documentation.copies(VOCABULARY, COPY_BATCH, COPY_LENGTH + 1, rng)
        else:
            ids = documentation.rows(train, BATCH, LENGTH + 1, rng)
        ids = ids.to(DEVICE)
        logits = model(ids[:, :-1]).logits[:, first:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, first + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


# --- policies, measured ---------------------------------------------------------------------------


def read(model, rows, policy):
    """Reads rows (B, LENGTH + 1) token by token after a prompt: perplexity, tokens a second, most
    bytes of the cache, and the weights (steps, layers, B, LENGTH) where the policy has them."""
    cache, loss, peak, weights = SparseWindowCache(model.config, policy=policy), 0.0, 0, []
    logits = model(rows[:, :PROMPT], past_key_values=cache).logits[:, -1]
    start = time.perf_counter()
    for t in range(PROMPT, LENGTH):
        loss += F.cross_entropy(logits, rows[:, t], reduction="sum").item()
        logits = model(rows[:, t : t + 1], past_key_values=cache).logits[:, -1]
        peak = max(peak, cache.nbytes)
        weights.append([weights_of(layer.state, t) for layer in cache.layers])
    steps = LENGTH - PROMPT
    seconds = time.perf_counter() - start
    return {
        "perplexity": math.exp(loss / (steps * len(rows))),
        "tokens_per_second": steps * len(rows) / seconds,
        "peak_bytes": peak,
    }, weights


def weights_of(state, step):
    """The weights (B, LENGTH) of the last step, by position, summed over heads; None without."""
    if state.ring.shape[2] == 0:
        return None  # a sum over all steps needs no rows
    row = state.ring[:, 0, step % state.ring.shape[2]]
    return row.new_zeros(len(row), LENGTH).scatter_add_(
        1, state.position[:, 0].clamp(min=0).long(), row
    )


def spearman(weights, dense_weights):
    """Rank correlation of two runs' weights of a step, over the tokens there are, on average."""
    found = []
    for t, (ours, theirs) in enumerate(zip(weights, dense_weights, strict=True), PROMPT):
        for a, b in zip(ours, theirs, strict=True):
            if a is None:
                return None
            a, b = ranks(a[:, : t + 1]), ranks(b[:, : t + 1])
            found.append(F.cosine_similarity(a, b, dim=1).mean())
    return torch.stack(found).mean().item()


def ranks(x):
    """Ranks of each row, equal values sharing the mean of theirs, about their mean."""
    x = x.contiguous()
    ordered = x.sort(dim=1).values
    rank = torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)
    return rank - rank.double().mean(dim=1, keepdim=True)


def compare(model, rows, args):
    """{name: [a cell for each sparsity]}, and the dense cell. Every policy runs on each row."""
    # a ratio of 1 reads every token too, and keeps the weights that the others are compared with
    _, dense_weights = read(model, rows, alisa(1.0, window=1))
    cells = {"dense": [read(model, rows, dense())[0] | {"sparsity": 0.0, "spearman": 1.0}]}
    for name in args.policy:
        cells[name] = []
        for sparsity in args.sparsity:
            cell, weights = read(model, rows, POLICIES[name](1 - sparsity, LENGTH))
            cell |= {"sparsity": sparsity, "spearman": spearman(weights, dense_weights)}
            cells[name].append(cell)
    return cells


def show(cells):
    print("\npolicy         sparsity  perplexity  rank correlation  tokens/s  peak KV kB")
    for name, row in cells.items():
        for cell in row:
            rho = "    -" if cell["spearman"] is None else f"{cell['spearman']:5.2f}"
            print(
                f"{name:15}{cell['sparsity']:8.0%}{cell['perplexity']:12.2f}{rho:>18}"
                f"{cell['tokens_per_second']:10.0f}{cell['peak_bytes'] / 1e3:12.0f}"
            )


def plot(cells, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    panels = {"perplexity": 1, "peak_bytes": 1e-3, "spearman": 1}
    titles = ("held-out perplexity", "peak bytes of the cache (kB)", "rank correlation with dense")
    for axis, (key, unit), title in zip(axes, panels.items(), titles, strict=True):
        full = cells["dense"][0][key] * unit
        for i, (name, row) in enumerate(cells.items()):
            if name != "dense" and row[0][key] is not None:
                x, y = [c["sparsity"] for c in row], [c[key] * unit for c in row]
                axis.plot([0, *x], [full, *y], marker="o", label=name, color=f"C{i - 1}")
        axis.axhline(full, color="grey", linestyle=":", label="dense")
        axis.set(title=title, xlabel="KV sparsity")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- a model of your own --------------------------------------------------------------------------


def answer(args):
    """Streams the continuation of the prompt under each policy and sparsity."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(DEVICE)
    inputs = tokenizer(args.prompt_file.read_text(encoding="utf-8"), return_tensors="pt").to(DEVICE)
    enable(model.eval())
    length = inputs["input_ids"].shape[1] + args.new_tokens
    runs = [("dense", 0.0)] + [(name, s) for name in args.policy for s in args.sparsity]
    for name, sparsity in runs:
        policy = POLICIES[name](1 - sparsity, length) if sparsity else dense()
        cache = SparseWindowCache(model.config, policy=policy)
        print(f"\n== {name}, sparsity {sparsity:.0%}")
        print(f"-- {stream(model, tokenizer, inputs, cache, args.new_tokens)}")


def main():
    args = arguments()
    if args.model:
        answer(args)
        return
    model, tokenizer, rows = miniature(args)
    enable(model)
    cells = compare(model, rows, args)
    show(cells)
    text = tokenizer.decode(rows[0, :PROMPT])
    print(f"\n{text!r} goes on, at {args.sparsity[-1]:.0%} sparsity:")
    for name in args.policy:
        cache = SparseWindowCache(
            model.config, policy=POLICIES[name](1 - args.sparsity[-1], LENGTH)
        )
        ids = model.generate(
            rows[:1, :PROMPT],
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        print(f"{name:15}{tokenizer.decode(ids[0, PROMPT:])!r}")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(cells, args.output / "alisa.png")
    result = {"settings": {key: str(value) for key, value in vars(args).items()}, "policies": cells}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=1))
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    print(f"\nfigure, numbers and model in {args.output}: alisa.png, metrics.json, model")


if __name__ == "__main__":
    main()
