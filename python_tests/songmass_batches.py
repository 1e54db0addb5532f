"""Small random songs as the model takes them, for the tests of SongMASS."""

import torch

from tokcore.masking import pad_rows

LYRIC_SIZE, MELODY_SIZE = 20, 152
NONE = {"source": -1, "target": -2}


def draw(low, high, generator):
    return int(torch.randint(low, high, (1,), generator=generator))


def song(words, seed, *, lyric_size=LYRIC_SIZE, melody_size=MELODY_SIZE):
    """Tokens, sentence ids and word ids of both kinds; words: how many in each sentence.

    A word is one lyric token and one or two notes; [sep] is a word of its own, </s> another.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = {"lyric": [], "melody": []}
    word = 0
    for sentence, count in enumerate(words):
        for _ in range(count):
            sides["lyric"].append((draw(7, lyric_size, generator), sentence, word))
            for _ in range(draw(1, 3, generator)):
                for token in (draw(7, 136, generator), draw(136, melody_size, generator)):
                    sides["melody"].append((token, sentence, word))
            word += 1
        for side in sides.values():
            side.append((5, sentence, word))
        word += 1
    for side in sides.values():
        side.append((2, None, word))
    return sides


def batch(songs, source_kind, target_kind, *, left=False):
    """Target and what SongMass.forward takes beside the kinds, padded on one side."""
    tensors = {}
    for role, kind in (("source", source_kind), ("target", target_kind)):
        none = NONE[role]
        rows = [one[kind] for one in songs]
        columns = {
            "": ([[token for token, _, _ in row] for row in rows], 1),
            "_sentences": ([[none if s is None else s for _, s, _ in row] for row in rows], none),
            "_words": ([[w for _, _, w in row] for row in rows], none),
        }
        for name, (values, filler) in columns.items():
            stacked = [torch.tensor(row, dtype=torch.int64) for row in values]
            tensors[role + name] = pad_rows(stacked, filler, left=left)
    before = [[2, *(token for token, _, _ in one[target_kind][:-1])] for one in songs]
    tensors["previous"] = pad_rows([torch.tensor(row) for row in before], 1, left=left)
    return tensors


def inputs(tensors):
    return {name: value for name, value in tensors.items() if name != "target"}
