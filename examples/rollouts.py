"""What the examples of the group-relative methods share: batches, samples, accuracy, the figure.

A task is an arithmetic.Task: a model to start from, its tokenizer and its questions.
"""

import re

import matplotlib.pyplot as plt
import torch

from tokcore.masking import pad_rows, shift_labels
from tokcore.ops import token_logprob

END = "</answer>"  # a response ends with it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- batches and losses ---------------------------------------------------------------------------


def prompts(rows, tokenizer, count=1):
    """The token ids of each prompt, ``count`` times."""
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    return [prompt for prompt in ids for _ in range(count)]


def batch_of(prefixes, responses, pad):
    """Token ids (B, T), filled up on the right, and the target (B, T) of each position: the next
    token of a response, -100 elsewhere."""
    pairs = list(zip(prefixes, responses, strict=True))
    ids = [torch.tensor([*prefix, *response]) for prefix, response in pairs]
    labels = [torch.tensor([*[-100] * len(prefix), *response]) for prefix, response in pairs]
    return pad_rows(ids, pad).to(DEVICE), shift_labels(pad_rows(labels, -100)).to(DEVICE)


def references(rows, tokenizer):
    return tokenizer([row["reference"] for row in rows], add_special_tokens=False)["input_ids"]


def logprobs(model, ids, target):
    return token_logprob(model(ids, use_cache=False).logits, target)


def supervised_loss(model, rows, tokenizer):
    """The mean over the tokens of the references."""
    pairs = prompts(rows, tokenizer), references(rows, tokenizer)
    ids, target = batch_of(*pairs, tokenizer.pad_token_id)
    return -logprobs(model, ids, target).sum() / (target != -100).sum()


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


# --- samples and answers --------------------------------------------------------------------------


def answer_of(response):
    """What stands between the answer tags that end a response, or None."""
    found = re.search(r".*<answer>(.*)</answer>\s*\Z", response, re.DOTALL)
    return found and found[1].strip()


def is_right(response, row):
    return answer_of(response) == row["answer"].strip()


@torch.no_grad()
def sampled(model, tokenizer, prefixes, length, stop=END, greedy=False):
    """A continuation of each prefix, as token ids, up to and with ``stop`` or eos."""
    ids = pad_rows([torch.tensor(p) for p in prefixes], tokenizer.pad_token_id, left=True)
    mask = pad_rows([torch.ones(len(p), dtype=torch.int64) for p in prefixes], 0, left=True)
    options = {"do_sample": not greedy, "pad_token_id": tokenizer.pad_token_id}
    if not greedy:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"max_new_tokens": length, "stop_strings": stop, "tokenizer": tokenizer}
    whole = model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **options)
    ends, found = {tokenizer.pad_token_id, tokenizer.eos_token_id}, []
    for row in whole[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        # What follows the stop is filler; an eos was sampled, and is learnt.
        found.append(row[:end] if stop in tokenizer.decode(row[:end]) else row[: end + 1])
    return found


def responses(model, task, rows, count):
    """``count`` samples for each row: their prompts and responses as token ids, and as texts."""
    repeated = prompts(rows, task.tokenizer, count)
    found = sampled(model, task.tokenizer, repeated, task.length)
    return repeated, found, task.tokenizer.batch_decode(found)


def answers(model, task):
    """The greedy responses to the held-out questions."""
    found = []
    for i in range(0, len(task.held_out), 256):
        prefixes = prompts(task.held_out[i : i + 256], task.tokenizer)
        found += sampled(model, task.tokenizer, prefixes, task.length, greedy=True)
    return task.tokenizer.batch_decode(found)


def accuracy(model, task):
    right = list(map(is_right, answers(model, task), task.held_out))
    return sum(right) / len(right)


# --- figure ---------------------------------------------------------------------------------------


def plot(runs, title, file):
    """Rewards of the samples, means of five steps, and held-out accuracy: a line a method and
    seed, one colour a method."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, run in enumerate(runs.values()):
        for colour, (name, method) in enumerate(run["methods"].items()):
            style = {"color": f"C{colour}", "alpha": 0.8, "label": None if number else name}
            rewards = [row["reward"] for row in method["history"] if "reward" in row]
            means = [
                sum(rewards[max(0, i - 5) : i]) / min(i, 5) for i in range(1, len(rewards) + 1)
            ]
            axes[0].plot(range(1, len(means) + 1), means, **style)
            known = [
                (row["step"], row["accuracy"]) for row in method["history"] if "accuracy" in row
            ]
            axes[1].plot(*zip((0, run["before"]), *known, strict=True), "o-", **style)
    for axis, name in zip(axes, (title, "held-out accuracy, greedy"), strict=True):
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(file, dpi=130)
