"""Preference pairs for the examples: from CPython's own documentation, or from your JSON lines.

A row is a dict of three strings: prompt, chosen, rejected.
"""

import json
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from tokcore.masking import collate_pairs, encode_pair, join_pairs

KEYS = ("prompt", "chosen", "rejected")


def prose():
    """The sentences of the module pydoc_data.topics, each once, without grammar and code."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name])]
    texts = [
        " ".join(p.replace("*", "").split()) for p in paragraphs if not re.search("::=|>>>", p)
    ]
    lines = [line for text in texts for line in re.split(r'(?<=[.:;?!]) (?=[A-Z"“])', text)]
    good = [x for x in lines if re.match(r"[A-Z].*[.:]$", x) and 8 <= len(x.split()) <= 40]
    return list(dict.fromkeys(good))


def corrupted(words, strangers, rng):
    """One edit for every four words: two neighbours change places, or a stranger moves in."""
    words = list(words)
    for place in rng.sample(range(len(words) - 1), max(1, len(words) // 4)):
        if rng.random() < 0.5:
            words[place], words[place + 1] = words[place + 1], words[place]
        else:
            words[place] = rng.choice(strangers)
    return words


def documentation_pairs(seed, limit=None):
    """Sentences for supervised training (55 %), rows to train on (33 %), rows held out (12 %).

    A row is the first half of a sentence, its true second half, and the second half corrupted.
    """
    rng, sentences = random.Random(seed), prose()
    rng.shuffle(sentences)
    sentences = sentences[:limit]
    first, second = len(sentences) * 55 // 100, len(sentences) * 88 // 100
    strangers, rows = " ".join(sentences[:first]).split(), []
    for words in map(str.split, sentences[first:]):
        half = len(words) // 2
        wrong = corrupted(words[half:], strangers, rng)
        texts = " ".join(words[:half]), " ".join(["", *words[half:]]), " ".join(["", *wrong])
        rows.append(dict(zip(KEYS, texts, strict=True)))
    return sentences[:first], rows[: second - first], rows[second - first :]


def train_tokenizer(sentences, size):
    """A byte-level BPE of ``size`` tokens, "<eos>" among them."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences, size, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")


def encode(row, tokenizer, window):
    """A row as the authors of DPO and TDPO tokenise it (tokcore.masking.encode_pair)."""
    for key in KEYS:
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"a row is an object with the strings {', '.join(KEYS)}; no {key}")
        if not row[key].strip():
            raise ValueError(f"{key} is empty")
    ids = tokenizer([row[key] for key in KEYS], add_special_tokens=False)["input_ids"]
    if len(ids[0]) >= window:
        raise ValueError(f"prompt has {len(ids[0])} tokens, the window {window}")
    limits = {"max_length": window, "max_prompt_length": window // 2}
    return encode_pair(*ids, eos=tokenizer.eos_token_id, keep="end", **limits)


def read_rows(path, tokenizer, window, skip_bad=False):
    """The rows of a JSON-lines file. A bad row ends the program with its place, file:line; with
    ``skip_bad`` it is left out and counted."""
    rows, bad = [], 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                encode(row, tokenizer, window)
                rows.append({key: row[key] for key in KEYS})
            except (ValueError, TypeError, RecursionError) as error:
                if not skip_bad:
                    sys.exit(f"{path}:{number}: {error}")
                bad += 1
    print(f"{path}: {len(rows)} pairs, {bad} bad rows skipped")
    return rows


@lru_cache(maxsize=1)
def order(count, seed):
    return random.Random(seed).sample(range(count), count)


def picked(rows, step, size, seed):
    """What a step trains on, by its number alone: a resumed run goes on with the same rows."""
    epoch, place = divmod(step, len(rows) // size)
    return [rows[i] for i in order(len(rows), f"{seed}/{epoch}")[place * size : (place + 1) * size]]


def batch_of(rows, tokenizer, window):
    """ids, mask and labels: chosen rows first, the rejected ones below."""
    pairs = [encode(row, tokenizer, window) for row in rows]
    return join_pairs(collate_pairs(pairs, pad=tokenizer.eos_token_id))
