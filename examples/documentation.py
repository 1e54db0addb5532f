"""CPython's documentation as its own installation carries it: pages, and rows to train on."""

import ast
import random
import sysconfig
from pathlib import Path

import torch

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def pages(limit=None):
    """{name: text}: the topics of `help()`, and of each module the names with their docstrings."""
    from pydoc_data.topics import topics

    found = {f"topic {name}": text for name, text in sorted(topics.items())}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"))[:limit]:
        name = path.relative_to(library)
        if SKIPPED.isdisjoint(name.parts):
            entries = list(_entries(ast.parse(path.read_bytes()), ""))
            found[str(name)] = "\n\n".join(entries)
    return {name: text for name, text in found.items() if text}


def _entries(node, prefix):
    text = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        title, prefix = f"class {prefix}{node.name}\n\n", f"{prefix}{node.name}."
    elif isinstance(node, DEFINITIONS):
        title = f"{prefix}{node.name}({ast.unparse(node.args)})\n\n"
    else:
        title = ""
    if text:
        yield title + text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield from _entries(child, prefix)


def split(texts, seed):
    """Nine tenths of the pages to train on, one tenth held out."""
    names = sorted(texts)
    random.Random(seed).shuffle(names)
    cut = len(names) // 10
    return [texts[name] for name in names[cut:]], [texts[name] for name in names[:cut]]


def rows(pages_ids, size, length, rng):
    """(size, length) token ids: stretches of pages, from the longer ones oftener."""
    weights = [len(ids) - length + 1 for ids in pages_ids]
    chosen = []
    for ids in rng.choices(pages_ids, weights, k=size):
        start = rng.randrange(len(ids) - length + 1)
        chosen.append(ids[start : start + length])
    return torch.tensor(chosen)


def copies(vocabulary, size, length, rng):
    """(size, length) token ids: tokens at random, then the same again; and the period.

    Predicting the second time takes a look far back, which prose teaches a miniature in many more
    steps than this does.
    """
    period = rng.randint(length // 8, length // 2)
    row = torch.randint(vocabulary, (size, period)).repeat(1, length // period + 1)
    return row[:, :length], period
