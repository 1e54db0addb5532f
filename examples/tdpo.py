"""TDPO against DPO on real text: supervised training, then the preference losses from one start.

    python examples/tdpo.py                                   # some minutes on two cores
    python examples/tdpo.py --quick                           # seconds: does everything run?
    python examples/tdpo.py --alpha 0.1 0.3 0.5 0.7 --seed 3  # TDPO2 at several alphas
    python examples/tdpo.py --model DIR_OR_ID --data pairs.jsonl [--resume]      # your own, TDPO2

The miniature trains a GPT-2 of a million parameters on the prose of CPython's own documentation.
A preference pair is the true second half of a sentence it has not seen (chosen) against the same
words with neighbours swapped and strangers put in (rejected). Your own pairs are JSON lines with
the strings prompt, chosen and rejected; the model should be trained on the chosen responses
already, and is saved in OUTPUT/METHOD beside a checkpoint to go on from.

Expect a held-out accuracy of 80 to 90 %, highest under TDPO2, and a sequential KL of chosen and
rejected that TDPO2 holds down, the more the higher alpha: docs/algorithms/tdpo.md.
"""

import argparse
import copy
import json
import random
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import preference_data as data
import torch
import torch.nn.functional as F
import transformers
from side_by_side import side_by_side
from tqdm import tqdm

from tokcore.algorithms.tdpo import dpo_loss, tdpo_loss
from tokcore.masking import collate_pairs, pad_rows, shift_labels
from tokcore.ops import token_logprob

# The miniature
VOCABULARY, WINDOW, WIDTH, LAYERS, HEADS = 2048, 64, 128, 4, 4
SFT_EPOCHS, SFT_BATCH, SFT_LR = 10, 32, 2e-3
SAMPLES, SAMPLE_LENGTH = 96, 24  # continuations whose entropy is measured, and their tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a run of seconds")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("outputs/tdpo"), help="plot, metrics.json, models")
    add("--method", nargs="+", choices=("dpo", "tdpo1", "tdpo2"), help="default: all; own: tdpo2")
    add("--alpha", nargs="+", type=float, default=[0.5], help="of TDPO2, one run each")
    add("--beta", type=float, default=0.1)
    add("--lr", type=float, help="default: 2e-4; own model: 5e-6")
    add("--steps", type=int, help="default: 150; own pairs: one epoch")
    add("--batch-size", type=int, default=8, help="pairs a step")
    add("--every", type=int, help="steps between evaluations (and checkpoints); default: a sixth")
    add("--model", help="folder or hub name of a causal language model")
    add("--data", type=Path, help="JSON lines of prompt, chosen, rejected; a tenth is held out")
    add("--window", type=int, default=512, help="longest prompt with response, in tokens")
    add("--skip-bad", action="store_true", help="count bad rows instead of stopping")
    add("--resume", action="store_true", help="go on from the checkpoints in OUTPUT")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together")
    args.method = args.method or (["tdpo2"] if args.model else ["dpo", "tdpo1", "tdpo2"])
    args.lr = args.lr or (5e-6 if args.model else 2e-4)
    args.warmup = 150 if args.model else 10
    return args


# --- model and pairs ------------------------------------------------------------------------------


def miniature(args):
    """A model after supervised training, its tokenizer, rows to train on and rows held out."""
    sentences, rows, held_out = data.documentation_pairs(args.seed, 300 if args.quick else None)
    tokenizer = data.train_tokenizer(sentences, VOCABULARY)
    eos, args.window = tokenizer.eos_token_id, WINDOW
    torch.manual_seed(args.seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    sizes |= {"n_positions": WINDOW, "bos_token_id": eos, "eos_token_id": eos}
    sizes["activation_function"] = "gelu_pytorch_tanh"  # GPT-2's own, as one kernel
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(DEVICE)
    texts = [torch.tensor([*ids[: WINDOW - 1], eos]) for ids in tokenizer(sentences)["input_ids"]]
    total = (2 if args.quick else SFT_EPOCHS) * (len(texts) // SFT_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), SFT_LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SFT_LR, total)
    for step in (bar := tqdm(range(total), "supervised", disable=None)):
        labels = pad_rows(data.picked(texts, step, SFT_BATCH, args.seed), -100).to(DEVICE)
        logits, target = model.train()(labels.clamp(min=0)).logits, shift_labels(labels)
        loss = -token_logprob(logits, target).sum() / (target != -100).sum()
        descend(loss, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model, tokenizer, rows, held_out


def own(args):
    """The same four from --model and --data."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model).float().to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token_id is None:
        sys.exit(f"{args.model}: the tokenizer has no eos token, which ends a response")
    args.window = min(args.window, getattr(model.config, "max_position_embeddings", args.window))
    rows = data.read_rows(args.data, tokenizer, args.window, args.skip_bad)
    held_out = min(256, len(rows) // 10)
    if not held_out or len(rows) - held_out < args.batch_size:
        sys.exit(f"{args.data}: {len(rows)} pairs are too few for a batch, and a tenth held out")
    random.Random(args.seed).shuffle(rows)
    return model, tokenizer, rows[held_out:], rows[:held_out]


# --- training -------------------------------------------------------------------------------------


def descend(loss, optimizer, schedule):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
    optimizer.step()
    schedule.step()


def both_logits(policy, reference, batch):
    ids, mask, labels = (batch[k].to(DEVICE) for k in ("input_ids", "attention_mask", "labels"))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        with torch.no_grad():
            reference_logits = reference(ids, attention_mask=mask, use_cache=False).logits
        policy_logits = policy(ids, attention_mask=mask, use_cache=False).logits
    return policy_logits, reference_logits, labels


def train(folder, loss_of, evaluated, reference, batches, args):
    """The authors' recipe, RMSprop at a constant rate after a warm-up -> policy, evaluations."""
    policy = copy.deepcopy(reference).requires_grad_()
    optimizer = torch.optim.RMSprop(policy.parameters(), args.lr)
    rate = lambda step: min(1.0, (step + 1) / (args.warmup + 1))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    start, history, file = 0, [], folder / "checkpoint.pt"
    run = {key: str(getattr(args, key)) for key in ("data", "seed", "batch_size", "lr", "beta")}
    if args.resume and file.exists():
        saved = torch.load(file, map_location=DEVICE, weights_only=True)
        if saved["run"] != run:
            sys.exit(f"{file} belongs to another run: {saved['run']}, not {run}")
        start, history = saved["step"], saved["history"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    for step in (bar := tqdm(range(start, args.steps + 1), folder.name, disable=None)):
        is_due = step % args.every == 0 or step == args.steps
        if is_due and (step > start or not history):
            history.append({"step": step} | evaluated(policy))
            if args.model:  # the miniature is trained anew in less time than one wants to resume
                folder.mkdir(parents=True, exist_ok=True)
                state = {key: part.state_dict() for key, part in parts.items()}
                state |= {"step": step, "history": history, "run": run}
                torch.save(state, folder / "checkpoint.new")
                (folder / "checkpoint.new").replace(file)  # never half a checkpoint
        if step < args.steps:
            loss, metrics = loss_of(*both_logits(policy, reference, batches(step)))
            descend(loss, optimizer, schedule)
            accuracy = metrics["rewards_train/accuracies"].mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.0%}")
    return policy, history


@torch.no_grad()
def evaluate(policy, reference, batches):
    """Held-out means. Accuracy: how often the chosen log-ratio is the higher one, DPO's reward."""
    found = []
    for batch in batches:
        logits = both_logits(policy, reference, batch)
        found.append(tdpo_loss(*logits, variant="tdpo1", beta=1.0, split="eval")[1])
    m = {key: torch.cat([metrics[key] for metrics in found]).double() for key in found[0]}
    ratio = m["rewards_eval/margins"] - m["kl_eval/margin"]  # m_c - m_r
    return {
        "accuracy": (ratio > 0).double().mean().item(),
        "kl_chosen": m["kl_eval/chosen"].mean().item(),
        "kl_rejected": m["kl_eval/rejected"].mean().item(),
        "margin": m["kl_eval/margin"].mean().abs().item(),
    }


@torch.no_grad()
def entropy(model, rows, tokenizer, args):
    """Nats a token, of the distributions that the model samples from after held-out prompts."""
    torch.manual_seed(args.seed)
    eos, length = tokenizer.eos_token_id, min(SAMPLE_LENGTH, args.window // 2)
    batch = collate_pairs([data.encode(row, tokenizer, args.window) for row in rows], pad=eos)
    ids, mask = (
        batch[f"prompt_{key}"][:, length - args.window :].to(DEVICE)
        for key in ("input_ids", "attention_mask")
    )
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": eos}
    options |= {"pad_token_id": eos, "max_new_tokens": length, "output_logits": True}
    sampled = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    tokens = sampled.sequences[:, ids.shape[1] :]
    is_end = (tokens == eos).long()
    target = tokens.masked_fill(is_end.cumsum(1) > is_end, -100)  # what follows the first eos
    _, nats = token_logprob(torch.stack(sampled.logits, 1), target, return_entropy=True)
    return (nats.sum() / (target != -100).sum()).item()


# --- fused and plain, plot, table -----------------------------------------------------------------


def plain_tdpo2(policy_logits, reference_logits, labels, *, alpha, beta):
    """The authors' formula: every position, in float32, a tensor for every step."""
    mask, labels = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0).unsqueeze(-1)
    log_p = policy_logits[:, :-1].float().log_softmax(-1)
    q = reference_logits[:, :-1].float().softmax(-1)
    log_q = q.log()
    kl = ((q * (log_q - log_p)).sum(-1) * mask).sum(-1)
    ratio = ((log_p.gather(-1, labels) - log_q.gather(-1, labels)).squeeze(-1) * mask).sum(-1)
    (m_c, m_r), (k_c, k_r) = ratio.chunk(2), kl.chunk(2)
    return -F.logsigmoid(beta * (m_c - m_r - alpha * (k_r - k_c.detach()))).mean(), {}


def fused_and_plain(policy, reference, batch, args):
    """TDPO2 on one batch: the loss with its gradient alone, and a whole step without optimizer."""
    policy_logits, *constants = both_logits(policy, reference, batch)
    leaf = policy_logits.detach().requires_grad_()
    losses = {"fused": partial(tdpo_loss, variant="tdpo2", alpha=0.5, beta=args.beta)}
    losses["plain"] = partial(plain_tdpo2, alpha=0.5, beta=args.beta)

    def gradient(loss):
        torch.autograd.grad(loss(leaf, *constants)[0], leaf)

    def step(loss):
        loss(*both_logits(policy, reference, batch))[0].backward()
        policy.zero_grad()

    found = {}
    for title, work in (("TDPO2 loss and its gradient", gradient), ("with both models", step)):
        runs = {name: partial(work, loss) for name, loss in losses.items()}
        found[title] = side_by_side(title, runs, rounds=2 if args.quick else 9)
    return found


def plot(curves, file):
    """The paper's figure: sequential KL of chosen and rejected, their distance; and accuracy."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    titles = {"kl_chosen": "sequential KL of the chosen, nats", "kl_rejected": "of the rejected"}
    titles |= {"margin": "their distance", "accuracy": "held-out preference accuracy"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, curve in curves.items():
            rows = curve["history"][key == "accuracy" :]  # undefined where policy = reference
            label = f"{name}, entropy {curve['entropy']:.2f}"
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[3].legend()
    figure.savefig(file, dpi=130)


def main():
    args = arguments()
    model, tokenizer, rows, held_out = own(args) if args.model else miniature(args)
    reference, size = model.eval().requires_grad_(False), args.batch_size  # eval: no dropout
    args.steps = args.steps or (len(rows) // size if args.model else 6 if args.quick else 150)
    args.every = args.every or max(1, args.steps // 6)
    print(f"{len(rows)} pairs to train on, {len(held_out)} held out; {args.steps} steps of {size}")
    batch = partial(data.batch_of, tokenizer=tokenizer, window=args.window)
    tests = [batch(held_out[i : i + size]) for i in range(0, len(held_out), size)]
    losses = {"dpo": dpo_loss, "tdpo1": partial(tdpo_loss, variant="tdpo1")}
    losses |= {f"tdpo2-{a}": partial(tdpo_loss, variant="tdpo2", alpha=a) for a in args.alpha}
    curves, before = {}, entropy(reference, held_out[:SAMPLES], tokenizer, args)
    for name in [name for name in losses if name.split("-")[0] in args.method]:
        policy, history = train(
            args.output / name,
            partial(losses[name], beta=args.beta),
            partial(evaluate, reference=reference, batches=tests),
            reference,
            lambda step: batch(data.picked(rows, step, size, args.seed)),
            args,
        )
        sampled = entropy(policy, held_out[:SAMPLES], tokenizer, args)
        curves[name] = {"history": history, "entropy": sampled}
        if args.model:
            policy.save_pretrained(args.output / name)
            tokenizer.save_pretrained(args.output / name)
    print("\nheld-out pairs  accuracy  KL chosen  KL rejected  distance  entropy of samples")
    print(f"{'before':14}{before:64.2f}")
    for name, curve in curves.items():
        accuracy, *kl = [value for key, value in curve["history"][-1].items() if key != "step"]
        numbers = "{:10.1%}{:11.2f}{:13.2f}{:10.2f}{:20.2f}".format(accuracy, *kl, curve["entropy"])
        print(f"{name:14}{numbers}")
    print()
    costs = fused_and_plain(policy, reference, batch(rows[:size]), args)
    args.output.mkdir(parents=True, exist_ok=True)
    plot(curves, args.output / "tdpo.png")
    result = {"settings": {key: str(value) for key, value in vars(args).items()}}
    result |= {"entropy_before": before, "methods": curves, "fused_and_plain": costs}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=1))
    print(f"\nplot and numbers in {args.output}: tdpo.png, metrics.json")


if __name__ == "__main__":
    main()
