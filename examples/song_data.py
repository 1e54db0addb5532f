"""Songs to train on: what music21's own package carries, or the scores of a folder.

Madrigals of Monteverdi and songs of the Trecento have their Italian text under the notes, several
voices a file; the fiddle tunes of Ryan's Mammoth Collection are melodies alone. Parsing takes
minutes the first time, so songs are kept as text (tokcore.algorithms.songmass.write_songs) and read
from there the next. Files, not voices, are split into training, validation and test: the voices of
a file share their words and much of their music.
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from tokcore.algorithms.songmass import (
    LyricVocabulary,
    encode_lyric,
    encode_melody,
    lyric_vocabulary,
    make_windows,
    normalise_key,
    quantise,
    read_songs,
    write_songs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRED = ("monteverdi", "trecento")
MELODIES, TUNES = "ryansMammoth", 400
LONGEST = 160  # tokens of a window; songs are cut where sentences end


@dataclass
class Data:
    vocabulary: LyricVocabulary
    songs: dict[str, list]  # of each part of the split, and "melodies"
    windows: dict[str, list]  # paired ones; of "melodies" one line each
    counts: dict[str, int]


def load(args, seed):
    """Parsed, prepared, split and cut into windows; says what was left out."""
    paired, melodies = parsed(args)
    files = sorted({song.name.split("/")[0] for song in paired})
    if len(files) < 3:
        raise SystemExit(f"songmass: a split needs three scores with lyrics, got {len(files)}")
    random.Random(seed).shuffle(files)
    tenth = max(1, len(files) // 10)
    parts = {"test": files[:tenth], "valid": files[tenth : 2 * tenth], "train": files[2 * tenth :]}
    songs, windows, counts = {}, {}, {}
    for part, names in parts.items():
        songs[part] = prepared(song for song in paired if song.name.split("/")[0] in names)
        counts[f"{part} songs"] = len(songs[part])
    songs["melodies"] = prepared(melodies)
    vocabulary = lyric_vocabulary(songs["train"], least=2)
    for part in parts:
        lyrics = [encode_lyric(song, vocabulary) for song in songs[part]]
        sides = [
            (lyric.sentences, encode_melody(song))
            for lyric, song in zip(lyrics, songs[part], strict=True)
        ]
        stride = LONGEST // 2 if part == "train" else None
        found = make_windows(sides, longest=LONGEST, stride=stride)
        windows[part] = found.windows
        counts[f"{part} windows"] = len(found.windows)
        counts[f"{part} sentences left out"] = found.incomplete + found.too_long
        counts[f"{part} unknown pieces of {sum(one.pieces for one in lyrics):,}"] = sum(
            one.unknown for one in lyrics
        )
    alone = [(encode_melody(song),) for song in songs["melodies"]]
    windows["melodies"] = make_windows(alone, longest=LONGEST, stride=LONGEST // 2).windows
    counts["melodies alone"] = len(songs["melodies"])
    return Data(vocabulary, songs, windows, counts)


def prepared(songs):
    """In C major or A minor, on the grid. Not prepare_songs: it leaves out what stays on one note,
    and madrigals declaim on one.
    """
    return [quantise(normalise_key(song).song).song for song in songs]


def parsed(args):
    """(paired songs, melodies), from the cache if it is there."""
    cache = args.cache / ("quick" if args.quick else "full")
    if args.corpus is None and (cache / "melodies.txt").exists():
        return read_songs(cache / "paired.txt"), read_songs(cache / "melodies.txt")
    from tokcore.integrations.music21 import corpus_songs, folder_songs

    if args.corpus is not None:
        return songs_of(folder_songs(args.corpus), "your scores"), []
    few = 2 if args.quick else None
    paired = [song for name in PAIRED for song in songs_of(islice(corpus_songs(name), few), name)]
    tunes = islice(corpus_songs(MELODIES), 4 if args.quick else TUNES)
    melodies = songs_of(tunes, MELODIES)
    cache.mkdir(parents=True, exist_ok=True)
    write_songs(paired, cache / "paired.txt")
    write_songs(melodies, cache / "melodies.txt")
    return paired, melodies


def songs_of(readings, name):
    songs, unreadable = [], 0
    for reading in tqdm(readings, desc=f"reading {name}", unit=" files"):
        songs += reading.songs
        unreadable += reading.error is not None
    if unreadable:
        print(f"{name}: {unreadable} files without lyrics or notes")
    return songs


def default_cache():
    return Path.home() / ".cache" / "tokcore" / "songs"


def on_device(batches):
    def move(value):
        return None if value is None else value.to(DEVICE)

    return {name: type(batch)(*map(move, batch)) for name, batch in batches.items()}
