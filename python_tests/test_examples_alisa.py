"""examples/alisa.py as a user starts it: on its own pages, and on their model and prompt."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="the extra [examples] is not installed")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[1] / "examples" / "alisa.py"
POLICIES = ["alisa", "h2o", "tova", "streaming_llm", "local_window", "strided"]


def run(*arguments):
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alisa")
    return folder, run("--quick", "--output", folder)


def test_quick(quick):
    folder, done = quick
    assert done.returncode == 0, done.stderr
    assert "past_key_values" not in done.stderr
    assert (folder / "alisa.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((folder / "metrics.json").read_text())["policies"]
    assert list(cells) == ["dense", *POLICIES]
    full = cells["dense"][0]
    for name in POLICIES:
        (cell,) = cells[name]
        assert f"\n{name:15}     80%" in done.stdout
        assert math.isfinite(cell["perplexity"])
        assert cell["peak_bytes"] < full["peak_bytes"]
        assert cell["tokens_per_second"] > 0
        assert (cell["spearman"] is None) == (name == "h2o")  # a sum over all steps has no rows


def test_own_model(quick, tmp_path):
    """The miniature as a user's model: each policy answers, with its figures."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Return the value of the argument. " * 8, encoding="utf-8")
    done = run(
        *("--model", quick[0] / "model", "--prompt-file", prompt, "--new-tokens", 12),
        *("--policy", "alisa", "tova", "--sparsity", 0.5),
    )
    assert done.returncode == 0, done.stderr
    for title in ("dense, sparsity 0%", "alisa, sparsity 50%", "tova, sparsity 50%"):
        assert f"== {title}" in done.stdout
    assert done.stdout.count("-- 12 tokens, ") == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "somewhere"], "--model and --prompt-file belong together"),
        (["--sparsity", "1.0"], r"--sparsity: must lie in [0, 1), got [1.0]"),
        (["--policy", "all"], "invalid choice: 'all'"),
    ],
)
def test_bad_arguments(arguments, error, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.setattr(sys, "argv", ["alisa.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert error in capsys.readouterr().err
