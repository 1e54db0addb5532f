"""The examples as a user starts them: each ends with its numbers, its figure and its table."""

import json
import math
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

GOOD = {"prompt": "the interpreter", "chosen": " evaluates it", "rejected": " it evaluates never"}


def test_tdpo_quick(tmp_path):
    command = [sys.executable, EXAMPLES / "tdpo.py", "--quick", "--output", tmp_path, "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for word in ("dpo", "tdpo1", "tdpo2-0.5", "fused", "plain", "entropy"):
        assert word in done.stdout
    assert (tmp_path / "tdpo.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert list(result["methods"]) == ["dpo", "tdpo1", "tdpo2-0.5"]
    for curve in result["methods"].values():
        first, *_, last = curve["history"]
        assert first["kl_chosen"] == first["kl_rejected"] == 0  # the policy starts at the reference
        assert last["kl_chosen"] > 0
        assert 0 <= last["accuracy"] <= 1
        assert math.isfinite(curve["entropy"])
    for work in result["fused_and_plain"].values():
        assert {"fused", "plain"} == work.keys()
        assert all(cell["ms"] > 0 for cell in work.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of a few thousand parameters and its tokenizer."""
    from preference_data import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([" ".join(GOOD.values())], 300)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    eos = tokenizer.eos_token_id
    config = transformers.GPT2Config(vocab_size=300, bos_token_id=eos, eos_token_id=eos, **sizes)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def importable_examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def tdpo(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tdpo.py", *map(str, flags)])
    runpy.run_path(str(EXAMPLES / "tdpo.py"), run_name="__main__")


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def pairs(count):
    return [GOOD | {"prompt": f"the {'very ' * (i % 3)}interpreter {i}"} for i in range(count)]


def test_tdpo_trains_a_model_on_pairs_and_resumes_where_it_stopped(tiny, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "pairs.jsonl", pairs(24))
    flags = ["--model", tiny, "--data", data, "--batch-size", 4, "--lr", 1e-3, "--every", 2]
    tdpo(monkeypatch, *flags, "--steps", 6, "--output", tmp_path / "once")
    tdpo(monkeypatch, *flags, "--steps", 4, "--output", tmp_path / "twice")
    tdpo(monkeypatch, *flags, "--steps", 6, "--output", tmp_path / "twice", "--resume")
    results = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("once", "twice")
    ]
    once, twice = (result["methods"] for result in results)
    assert list(once) == ["tdpo2-0.5"]  # one's own model: the method that README and paper advise
    assert [row["step"] for row in once["tdpo2-0.5"]["history"]] == [0, 2, 4, 6]
    assert once == twice
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = load(tiny), load(tmp_path / "twice" / "tdpo2-0.5")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "Expecting property name"),
        ("[1, 2]", "a row is an object with the strings prompt, chosen, rejected"),
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        (GOOD | {"chosen": 3}, "no chosen"),
        (GOOD | {"rejected": "  "}, "rejected is empty"),
        (GOOD | {"prompt": "interpreter " * 40}, "tokens, the window 32"),
        (GOOD | {"chosen": "x<eos>"}, "chosen must not contain the eos token"),
        ('{"prompt": "\udcff"}', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_tdpo_stops_at_a_bad_row_with_its_place_or_counts_it(
    tiny, tmp_path, monkeypatch, capsys, bad, message
):
    rows = [*pairs(12), bad, *pairs(12)]
    data = tmp_path / "pairs.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    flags = ["--model", tiny, "--data", data, "--batch-size", 4, "--steps", 1, "--output", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        tdpo(monkeypatch, *flags)
    assert str(stopped.value).startswith(f"{data}:13: ")
    assert message in str(stopped.value)
    if message == "Expecting value":
        tdpo(monkeypatch, *flags, "--skip-bad")
        assert "24 pairs, 1 bad rows skipped" in capsys.readouterr().out


def test_tdpo_refuses_half_of_a_pair_of_flags_and_too_few_pairs(
    tiny, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        tdpo(monkeypatch, "--model", tiny)
    assert "--model and --data belong together" in capsys.readouterr().err
    data = write_rows(tmp_path / "pairs.jsonl", pairs(5))
    with pytest.raises(SystemExit, match="5 pairs are too few"):
        tdpo(monkeypatch, "--model", tiny, "--data", data, "--output", tmp_path)
