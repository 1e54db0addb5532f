"""Arithmetic in steps, for the examples: questions, demonstrations, a small model to start from.

A question joins digits by +, - and *. A result above 9 counts as 9, one below 0 as 0, and * comes
before + and -:

    3+4*2-4=<plan>213</plan><think>4*2=8;3+8=9;9-4=5</think><answer>5</answer>
    3+4*2-4=<plan>2</plan><think>4*2=8;3+8-4=5</think><answer>5</answer>
    3+4*2-4=<plan>0</plan><think>3+4*2-4=5</think><answer>5</answer>

The plan numbers the operators that are done singly, in the order of their turns (0: none); the
thinking does them, and what is left at once. All three demonstrations are right, but a model of
this size errs more often where it does more at once: there is something to find for a method that
learns from its own answers.

A row is a dict of strings: prompt, answer (what must stand between the answer tags), reference
(a right response). Your own rows are JSON lines with prompt and answer; their reference is the
answer between its tags.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from rollouts import DEVICE, END, answer_of, descend, supervised_loss
from tqdm import tqdm

TAGS = [f"<{slash}{name}>" for name in ("plan", "think", "answer") for slash in ("", "/")]
OPERANDS = (3, 4)  # fewest and most digits of a question
DIGITS, MOST = 6, 9  # a question's digits are 0 to 5, results are held between 0 and 9
CAREFUL = 0.25  # of the demonstrations do every operation singly
WINDOW, WIDTH, LAYERS, HEADS = 48, 64, 2, 4
SCALE = 0.08  # of the first weights: GPT-2's 0.02 is for wide models, and slow here
SFT_STEPS, SFT_BATCH, SFT_LR = 350, 32, 4e-3
HELD_OUT = 400


class Task(NamedTuple):
    """A model to start from, and its questions: ``rows(step, count)`` to train on, ``held_out``."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    rows: Callable[[int, int], list[dict[str, str]]]
    held_out: list[dict[str, str]]
    length: int  # most tokens of a response


# --- questions and answers ------------------------------------------------------------------------


def demonstration(digits, operators, planned, rng):
    """A right response that plans and does so many operations singly, in an order that chance
    picks among those that precedence allows, and the rest at once."""
    values, left, plan, steps = list(digits), list(enumerate(operators, 1)), "", []
    for turn in range(len(operators)):
        names = "".join(name for _, name in left)
        if turn == planned:
            steps.append(joined(values, names))
        i = rng.choice([found.start() for found in re.finditer(r"(?<!\*)\*|^[+-](?!\*)", names)])
        number, name = left.pop(i)
        a, b = values[i : i + 2]
        values[i : i + 2] = [min(MOST, max(0, {"+": a + b, "-": a - b, "*": a * b}[name]))]
        if turn < planned:
            plan += str(number)
            steps.append(f"{a}{name}{b}={values[i]}")
    if planned < len(operators):
        steps[-1] += f"={values[0]}"
    thinking = f"<think>{';'.join(steps)}</think>"
    return f"<plan>{plan or 0}</plan>{thinking}<answer>{values[0]}{END}"


def joined(values, operators):
    return "".join(f"{v}{o}" for v, o in zip(values, [*operators, ""], strict=True))


def question(rng, careful=CAREFUL):
    count = rng.randint(*OPERANDS)
    digits, operators = rng.choices(range(DIGITS), k=count), rng.choices("+-*", k=count - 1)
    planned = len(operators) if rng.random() < careful else rng.randrange(len(operators) - 1)
    reference = demonstration(digits, operators, planned, rng)
    prompt = joined(digits, operators) + "="
    return {"prompt": prompt, "answer": answer_of(reference), "reference": reference}


def symbols():
    """A tokenizer with a token for every symbol and tag."""
    names = ["<eos>", *TAGS, *"0123456789+-*=;", *"abcdef"]  # letters: generate() tries them
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    pattern = tokenizers.Regex("</?[a-z]+>|.")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# --- flags, and a model to start from -------------------------------------------------------------


def add_common_arguments(parser, name, steps, lr):
    parser.set_defaults(default_steps=steps, default_lr=lr)
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs") / name, help="plot, metrics.json, models")
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=int, default=1, help="how many, each with its own start; a line each")
    add("--steps", type=int, help=f"default: {steps}")
    add("--lr", type=float, help=f"default: {lr:g}; own model: 1e-6")
    add("--every", type=int, help="steps between evaluations; default: a fifth")
    add("--model", help="folder or hub name of a causal language model")
    add("--data", type=Path, help="JSON lines of prompt, answer; a tenth is held out")
    add("--length", type=int, default=256, help="most tokens of a response, own model")
    add("--skip-bad", action="store_true", help="count bad rows instead of stopping")


def parsed(parser):
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together")
    args.steps = args.steps or (3 if args.quick else args.default_steps)
    args.lr = args.lr or (1e-6 if args.model else args.default_lr)
    args.every = args.every or max(1, args.steps // 5)
    return args


def start(args, seed):
    if args.model:
        return own(args.model, args.data, seed, args.length, args.skip_bad)
    return miniature(seed, 20 if args.quick else SFT_STEPS, 32 if args.quick else HELD_OUT)


def miniature(seed, steps, questions):
    """A GPT-2 of a hundred thousand parameters, trained for a short time on demonstrations."""
    rng, tokenizer = random.Random(seed), symbols()
    held_out = {row["prompt"]: row for row in (question(rng) for _ in range(questions))}

    def rows(step, count, part="train", careful=CAREFUL):
        rng, found = random.Random(f"{seed}/{part}/{step}"), []
        while len(found) < count:
            row = question(rng, careful)
            found += [row] if row["prompt"] not in held_out else []
        return found

    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer), "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    sizes |= {"n_positions": WINDOW, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"initializer_range": SCALE}
    sizes |= {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own, as one kernel
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(DEVICE).eval()
    optimizer = torch.optim.AdamW(model.parameters(), SFT_LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SFT_LR, steps, 0.15)
    for step in (bar := tqdm(range(steps), "supervised", disable=None)):
        # First the arithmetic, on what can be followed; then demonstrations as they come.
        careful = 1.0 if step < 0.6 * steps else CAREFUL
        loss = supervised_loss(model, rows(step, SFT_BATCH, "supervised", careful), tokenizer)
        descend(loss, optimizer)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return Task(model, tokenizer, rows, list(held_out.values()), WINDOW - 2 * OPERANDS[1])


def own(model, data, seed, length, skip_bad):
    """The same from a folder or hub name and a JSON-lines file; a tenth of it is held out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    model = transformers.AutoModelForCausalLM.from_pretrained(model).float().to(DEVICE).eval()
    if tokenizer.eos_token is None:
        sys.exit(f"{model}: the tokenizer has no eos token, which ends a response")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    window = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    found = read_rows(data, tokenizer, window - length, skip_bad)
    held_out = min(256, len(found) // 10)
    if not held_out:
        sys.exit(f"{data}: {len(found)} rows are too few to hold a tenth out")
    random.Random(seed).shuffle(found)
    known = found[held_out:]

    def rows(step, count):
        return random.Random(f"{seed}/{step}").choices(known, k=count)

    return Task(model, tokenizer, rows, found[:held_out], length)


def read_rows(path, tokenizer, longest, skip_bad=False):
    """The rows of a JSON-lines file. A bad row ends the program with its place, file:line; with
    ``skip_bad`` it is left out and counted."""
    rows, bad = [], 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(checked(json.loads(line), tokenizer, longest))
            except (ValueError, TypeError, RecursionError) as error:
                if not skip_bad:
                    sys.exit(f"{path}:{number}: {error}")
                bad += 1
    print(f"{path}: {len(rows)} rows, {bad} bad rows skipped")
    return rows


def checked(row, tokenizer, longest):
    for key in ("prompt", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"a row is an object with the strings prompt and answer; no {key}")
        if not row[key].strip():
            raise ValueError(f"{key} is empty")
    count = len(tokenizer(row["prompt"])["input_ids"])
    if count > longest:
        raise ValueError(f"prompt has {count} tokens, {longest} leave room for a response")
    return row | {"reference": f"<answer>{row['answer'].strip()}{END}"}
