"""The examples of the group-relative methods, as a user starts them, and what they share."""

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra [examples] is not installed")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"
# Third parties announce their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "grpo": ["grpo"],
    "grao": ["sft", "dpo", "grpo", "grao"],
    "pta_grpo": ["grpo", "pta-plan", "pta"],
}


@pytest.fixture(scope="module", autouse=True)
def importable_examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def run(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    return runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


# --- from nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", METHODS)
def test_quick(script, tmp_path):
    flags = ["--quick", "--output", tmp_path, "--seed", "1", "--seeds", "2"]
    command = [sys.executable, EXAMPLES / f"{script}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for word in (*METHODS[script], "held-out questions", "seed 1", "seed 2", "mean"):
        assert word in done.stdout
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert list(result["runs"]) == ["1", "2"]
    for seed in result["runs"].values():
        assert list(seed["methods"]) == METHODS[script]
        for method in seed["methods"].values():
            assert [row["step"] for row in method["history"]] == [1, 2, 3]
            assert all(-1 <= row.get("reward", 0) <= 1 for row in method["history"])
            assert 0 <= method["history"][-1]["accuracy"] <= 1
    if script == "pta_grpo":
        costs = result["tree_and_rows"]
        assert costs["tokens_saved"] > 0
        assert costs["tree"]["ms"] > 0 < costs["rows"]["ms"]
        assert all(
            0 < seed["methods"]["pta"]["tokens_saved"] < 1 for seed in result["runs"].values()
        )
    if script == "grpo":
        for work in result["fused_and_plain"].values():
            assert {"fused", "plain"} == work.keys()
            assert all(cell["ms"] > 0 for cell in work.values())


@pytest.mark.parametrize("loss", ["dr_grpo", "dapo", "gspo", "rloo"])
def test_grpo_has_the_losses_of_the_family(loss, monkeypatch, tmp_path, capsys):
    flags = ["--quick", "--loss", loss, "--steps", 1, "--questions", 2, "--output", tmp_path]
    run(monkeypatch, "grpo", *flags)
    assert loss in capsys.readouterr().out
    runs = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert list(runs["0"]["methods"]) == [loss]


# --- the task -------------------------------------------------------------------------------------


def evaluated(text):
    """By a route of its own: products first, then from left to right, each held in 0 to 9."""
    held = lambda value: min(9, max(0, value))  # noqa: E731
    terms = re.split(r"([+-])", text)
    values = []
    for term in terms[::2]:
        product = None
        for digit in map(int, term.split("*")):
            product = digit if product is None else held(product * digit)
        values.append(product)
    total = values[0]
    for sign, value in zip(terms[1::2], values[1:], strict=True):
        total = held(total + value if sign == "+" else total - value)
    return total


def test_demonstrations_are_right_whatever_they_plan():
    import arithmetic
    from rollouts import answer_of, is_right

    rng, plans = random.Random(0), set()
    for _ in range(300):
        row = arithmetic.question(rng)
        prompt = row["prompt"]
        assert prompt.endswith("=")
        assert row["answer"] == str(evaluated(prompt[:-1])) == answer_of(row["reference"])
        assert is_right(row["reference"], row)
        plan, steps = re.fullmatch(
            r"<plan>(\d+)</plan><think>(.*)</think><answer>\d</answer>", row["reference"]
        ).groups()
        *singly, last = steps.split(";")
        for step in (*singly, last):
            text, value = step.split("=")
            assert str(evaluated(text)) == value
        operators = re.findall(r"[+*-]", prompt)
        assert all(re.fullmatch(r"\d[+*-]\d=\d", step) for step in singly)
        planned = [] if plan == "0" else [operators[int(number) - 1] for number in plan]
        done = re.findall(r"\d([+*-])\d=", ";".join((*singly, last)))
        assert planned == done[: len(planned)]
        plans.add(len(operators) - len(planned))
    assert plans == {0, 2, 3}  # all operations are planned, or at least two are done at once


def test_the_tokenizer_has_a_token_for_each_symbol():
    import arithmetic

    tokenizer, row = arithmetic.symbols(), arithmetic.question(random.Random(1))
    text = row["prompt"] + row["reference"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(re.findall(r"</?\w+>|.", text))
    assert len(tokenizer) < 64
    assert 0 not in ids  # eos, which is also what stands for an unknown symbol


def test_held_out_questions_are_not_trained_on():
    import arithmetic

    task = arithmetic.miniature(5, steps=2, questions=200)
    held_out = {row["prompt"] for row in task.held_out}
    trained = {row["prompt"] for step in range(20) for row in task.rows(step, 50)}
    assert held_out
    assert trained
    assert not held_out & trained
    assert task.rows(3, 7) == task.rows(3, 7) != task.rows(4, 7)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<plan>1</plan><think>1+1=2</think><answer>2</answer>", "2"),
        ("<answer> 12 </answer>\n", "12"),
        ("<answer>1</answer><answer>2</answer>", "2"),  # the one that ends the response counts
        ("<answer>x < y</answer>", "x < y"),
        ("<answer>2</answer> I think", None),
        ("<answer>2", None),
        ("2</answer>", None),
        ("", None),
    ],
)
def test_the_answer_stands_between_the_tags_that_end_a_response(response, answer):
    from rollouts import answer_of

    assert answer_of(response) == answer


def test_judge():
    judge = runpy.run_path(str(EXAMPLES / "grao.py"))["judge"]
    full = "<plan>12</plan><think>1+2=3;3-1=2</think><answer>2</answer>"
    short = "<plan>0</plan><think>1+2-1=2</think><answer>2</answer>"
    padded = full.replace("1+2=3", "1+2=3;4+4=8;5+4=9")
    wrong = full.replace("<answer>2", "<answer>3")
    verdicts = [
        judge("1+2-1=", *pair)
        for pair in ((full, short), (full, full), (short, full), (wrong, short), (padded, full))
    ]
    assert verdicts == ["1 > 2", "1 = 2", "1 < 2", "1 < 2", "1 = 2"]


# --- one's own model and questions ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of some thousand parameters that answers 1 or 2 to everything."""
    import arithmetic
    from rollouts import descend, supervised_loss

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), arithmetic.symbols()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.2}
    sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        descend(supervised_loss(model, questions(8), tokenizer), optimizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(count):
    reference = "<plan>1</plan><think>3</think><answer>{}</answer>"
    return [
        {"prompt": f"{i % 7}+{'1+' * (i % 3)}2=", "answer": a, "reference": reference.format(a)}
        for i in range(count)
        for a in [str(1 + i % 2)]
    ]


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    return path


def own_rows(count):
    return [{key: row[key] for key in ("prompt", "answer")} for row in questions(count)]


@pytest.mark.parametrize("script", METHODS)
def test_trains_a_model_on_questions(script, tiny, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "questions.jsonl", own_rows(40))
    flags = ["--model", tiny, "--data", data, "--length", 24, "--questions", 4, "--steps", 2]
    run(monkeypatch, script, *flags, "--lr", 1e-3, "--output", tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    before = load(tiny)
    folders = [tmp_path] if script == "grpo" else [tmp_path / name for name in METHODS[script]]
    for folder in folders:
        assert not torch.equal(before.lm_head.weight, load(folder).lm_head.weight)
        assert len(transformers.AutoTokenizer.from_pretrained(folder)) < 64
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert list(result["runs"]["0"]["methods"]) == METHODS[script]


def test_samples_do_not_depend_on_the_batch_and_end_where_they_should(tiny):
    from rollouts import answer_of, batch_of, logprobs, prompts, sampled

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, tokenizer = load(tiny).eval(), transformers.AutoTokenizer.from_pretrained(tiny)
    ids = prompts(questions(9), tokenizer)
    assert len({len(prompt) for prompt in ids}) > 1
    together = sampled(model, tokenizer, ids, 24, greedy=True)
    assert together == [sampled(model, tokenizer, [one], 24, greedy=True)[0] for one in ids]
    texts = tokenizer.batch_decode(together)
    assert all(answer_of(text) is not None for text in texts)
    plans = sampled(model, tokenizer, ids, 24, stop="</plan>", greedy=True)
    assert all(text.endswith("</plan>") for text in tokenizer.batch_decode(plans))
    assert all(len(one) == 2 for one in sampled(model, tokenizer, ids, 2))
    # Greedy tokens are the likeliest ones where the loss looks them up, too.
    batch, target = batch_of(ids, together, tokenizer.pad_token_id)
    with torch.no_grad():
        best = model(batch).logits.log_softmax(-1).amax(-1)
        logprob = logprobs(model, batch, target)
    kept = target != -100
    assert kept.sum() == sum(map(len, together))
    torch.testing.assert_close(logprob[kept], best[kept])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "Expecting property name"),
        ("[1, 2]", "a row is an object with the strings prompt and answer"),
        ({"prompt": "1+1="}, "no answer"),
        ({"prompt": "1+1=", "answer": 2}, "no answer"),
        ({"prompt": "1+1=", "answer": " "}, "answer is empty"),
        ({"prompt": "1+" * 40, "answer": "2"}, "prompt has 80 tokens, 16 leave room"),
        ('{"prompt": "\udcff"}', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_a_bad_row_stops_with_its_place_or_is_counted(
    tiny, tmp_path, monkeypatch, capsys, bad, message
):
    data = write_rows(tmp_path / "questions.jsonl", [*own_rows(12), bad, *own_rows(12)])
    flags = ["--model", tiny, "--data", data, "--length", 24, "--questions", 2, "--steps", 1]
    flags += ["--output", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "grpo", *flags)
    assert str(stopped.value).startswith(f"{data}:13: ")
    assert message in str(stopped.value)
    if message == "Expecting value":
        run(monkeypatch, "grpo", *flags, "--skip-bad")
        assert "24 rows, 1 bad rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize("script", METHODS)
def test_refuses_half_of_a_pair_of_flags_and_too_few_rows(
    script, tiny, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        run(monkeypatch, script, "--model", tiny)
    assert "--model and --data belong together" in capsys.readouterr().err
    data = write_rows(tmp_path / "questions.jsonl", own_rows(5))
    flags = ["--model", tiny, "--data", data, "--length", 24, "--output", tmp_path]
    with pytest.raises(SystemExit, match="5 rows are too few"):
        run(monkeypatch, script, *flags)
