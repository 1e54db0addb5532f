"""PTA-GRPO against GRPO: plans first, several continuations of each, and a reward for the plan.

    python examples/pta_grpo.py                      # minutes on one core
    python examples/pta_grpo.py --quick              # seconds: does everything run?
    python examples/pta_grpo.py --seeds 3 --plans 4 --continuations 3
    python examples/pta_grpo.py --model DIR_OR_ID --data questions.jsonl [--lr 1e-6]     # your own

From one start (arithmetic.py) and with the same number of samples for each question:

    grpo       PLANS * CONTINUATIONS independent responses, 1 for a right answer
    pta-plan   PLANS plans, CONTINUATIONS of each, without the reward of plans (beta = 0)
    pta        with it: a plan earns by how often its continuations are right

The reward of short responses is off: the paper leaves its weight open, and here what is short has
skipped steps. With --alpha 0.1 accuracy falls to 54 %, below the start.

The prompt and the plan go through the model once for all their continuations (pack_tree): the last
lines compare the time of an update with that of a row for each response. Your own questions are
JSON lines with the strings prompt and answer; the prompt has to ask for
<plan>...</plan><think>...</think><answer>...</answer>.

Expect, from 58 % of the held-out questions right (means of seeds 0 to 2), 65 to 66 % after each
method: neither plans nor their reward gain anything here, where a plan is one to three digits. A
tree saves a quarter of the tokens.
"""

import argparse
import copy
import json
from functools import partial

import arithmetic
import torch
from rollouts import (
    DEVICE,
    accuracy,
    batch_of,
    descend,
    is_right,
    logprobs,
    plot,
    prompts,
    responses,
    sampled,
)
from side_by_side import side_by_side
from tqdm import tqdm

from tokcore.algorithms.grpo import grpo_loss
from tokcore.algorithms.pta_grpo import (
    pack_tree,
    parse_response,
    pta_grpo_advantages,
    pta_grpo_loss_from_tokens,
    pta_grpo_rewards,
    tree_logprob,
)
from tokcore.ops import group_advantage

METHODS = ("grpo", "pta-plan", "pta")
UPDATES = 2  # for each rollout
PLAN_WEIGHT = 0.5  # beta, the paper's


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a run of seconds")
    add("--method", nargs="+", choices=METHODS, default=METHODS)
    add("--questions", type=int, default=10, help="for each step")
    add("--plans", type=int, default=4, help="of a question")
    add("--continuations", type=int, default=3, help="of a plan")
    add("--alpha", type=float, default=0.0, help="largest reward of a short response")
    arithmetic.add_common_arguments(parser, "pta_grpo", steps=40, lr=3e-4)
    return arithmetic.parsed(parser)


# --- rollouts -------------------------------------------------------------------------------------


def flat_rollout(policy, task, rows, args):
    """ids and target of independent responses, their advantages, how many are right."""
    group = args.plans * args.continuations
    repeated, found, texts = responses(policy, task, rows, group)
    right = [float(is_right(text, rows[i // group])) for i, text in enumerate(texts)]
    rewards = torch.tensor(right, device=DEVICE)
    batch = batch_of(repeated, found, task.tokenizer.pad_token_id)
    return batch, group_advantage(rewards, group), rewards.mean().item()


def tree_rollout(policy, task, rows, args, plan_weight):
    """prompts, plans and continuations as token ids, advantages, how many are right."""
    m, z, tokenizer = args.plans, args.continuations, task.tokenizer
    repeated, limit = prompts(rows, tokenizer, m), task.length // 3
    plans = sampled(policy, tokenizer, repeated, limit, stop="</plan>")
    prefixes = [p + plan for p, plan in zip(repeated, plans, strict=True) for _ in range(z)]
    rest = sampled(policy, tokenizer, prefixes, task.length - limit)
    whole = [plans[i // z] + ids for i, ids in enumerate(rest)]
    texts = tokenizer.batch_decode(whole)
    right = [is_right(text, rows[i // (m * z)]) for i, text in enumerate(texts)]
    format_ok = [parse_response(text) is not None for text in texts]
    parts = [
        torch.tensor(part).view(-1, m, z) for part in (right, format_ok, list(map(len, whole)))
    ]
    rewards = pta_grpo_rewards(*parts, beta=plan_weight, alpha=args.alpha)
    advantages = pta_grpo_advantages(rewards.total).flatten().to(DEVICE)
    continuations = [rest[i : i + z] for i in range(0, len(rest), z)]
    return (repeated, plans, continuations), advantages, rewards.outcome.mean().item()


# --- training -------------------------------------------------------------------------------------


def flat_logprob(policy, batch):
    ids, target = batch
    return logprobs(policy, ids, target), target != -100


def tree_logprobs(policy, tree):
    options = {"attention_mask": tree.additive_mask(policy.dtype), "use_cache": False}
    output = policy(tree.input_ids, position_ids=tree.position_ids, **options)
    return tree_logprob(output.logits, tree), tree.mask


def train(name, task, seed, args):
    policy, history, saved = copy.deepcopy(task.model), [], []
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, weight_decay=0.0)
    torch.manual_seed(seed)
    for step in (bar := tqdm(range(1, args.steps + 1), name, disable=None)):
        rows = task.rows(step, args.questions)
        if name == "grpo":
            batch, advantages, right = flat_rollout(policy, task, rows, args)
            logprob_of = flat_logprob
        else:
            weight = PLAN_WEIGHT if name == "pta" else 0.0
            lists, advantages, right = tree_rollout(policy, task, rows, args, weight)
            batch, logprob_of = pack_tree(*lists).to(DEVICE), tree_logprobs
            saved.append(batch.tokens_saved / (batch.tokens + batch.tokens_saved))
        old = None  # the first update starts where the samples come from: all its ratios are 1
        for _ in range(UPDATES):
            logprob, mask = logprob_of(policy, batch)
            loss = loss_of(name, logprob, mask, advantages, old)
            descend(loss, optimizer)
            old = logprob.detach() if old is None else old
        history.append({"step": step, "reward": right})
        if step % args.every == 0 or step == args.steps:
            history[-1]["accuracy"] = accuracy(policy, task)
        bar.set_postfix(right=f"{right:.0%}")
    return policy, history, sum(saved) / max(1, len(saved))


def loss_of(name, logprob, mask, advantages, old):
    if name == "grpo":
        return grpo_loss(logprob, advantages, old_logprob=old, mask=mask)[0]
    return pta_grpo_loss_from_tokens(logprob, mask, advantages, old_logprob=old)[0]


# --- tree against rows, table ---------------------------------------------------------------------


def tree_and_rows(policy, task, args):
    """An update without optimizer on one rollout, from its trees and from a row a response."""
    rows, z = task.rows(0, args.questions), args.continuations
    lists, advantages, _ = tree_rollout(policy, task, rows, args, PLAN_WEIGHT)
    repeated, plans, continuations = lists
    tree = pack_tree(*lists).to(DEVICE)
    whole = [p + ids for p, several in zip(plans, continuations, strict=True) for ids in several]
    pairs = [prompt for prompt in repeated for _ in range(z)], whole
    flat = batch_of(*pairs, task.tokenizer.pad_token_id)

    def update(logprob_of, batch):
        pta_grpo_loss_from_tokens(*logprob_of(policy, batch), advantages)[0].backward()
        policy.zero_grad()

    runs = {"tree": partial(update, tree_logprobs, tree)}
    runs |= {"rows": partial(update, flat_logprob, flat)}
    found = side_by_side("update", runs, rounds=2 if args.quick else 9)
    total = tree.tokens + tree.tokens_saved
    print(f"{tree.tokens} tokens in trees, {total} in rows: {tree.tokens_saved / total:.0%} saved")
    return found | {"tokens": tree.tokens, "tokens_saved": tree.tokens_saved}


def print_table(runs, count):
    print(f"\n{count} held-out questions, greedy    accuracy    gain   tokens saved")
    rows = {}
    for seed, run in runs.items():
        print(f"seed {seed}, supervised start {run['before']:18.1%}")
        for name, method in run["methods"].items():
            after = method["history"][-1]["accuracy"]
            numbers = after, 100 * (after - run["before"]), method["tokens_saved"]
            rows.setdefault(name, []).append(numbers)
            print("  {:30}{:8.1%}{:+8.1f}{:15.0%}".format(name, *numbers))
    if len(runs) > 1:
        print(f"mean of {len(runs)} seeds")
        for name, several in rows.items():
            means = [sum(column) / len(several) for column in zip(*several, strict=True)]
            print("  {:30}{:8.1%}{:+8.1f}{:15.0%}".format(name, *means))


def main():
    args = arguments()
    runs = {}
    for seed in range(args.seed, args.seed + args.seeds):
        task = arithmetic.start(args, seed)
        run = runs[seed] = {"before": accuracy(task.model, task), "methods": {}}
        for name in args.method:
            policy, history, saved = train(name, task, seed, args)
            run["methods"][name] = {"history": history, "tokens_saved": saved}
            if args.model:
                policy.save_pretrained(args.output / name)
                task.tokenizer.save_pretrained(args.output / name)
    print_table(runs, len(task.held_out))
    print()
    costs = tree_and_rows(policy, task, args)
    args.output.mkdir(parents=True, exist_ok=True)
    plot(runs, "right among the samples", args.output / "pta_grpo.png")
    result = {"settings": {key: str(value) for key, value in vars(args).items()}}
    result |= {"runs": runs, "tree_and_rows": costs}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=1))
    print(f"\nplot and numbers in {args.output}: pta_grpo.png, metrics.json")


if __name__ == "__main__":
    main()
