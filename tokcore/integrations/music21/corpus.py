"""Many scores, one after another: music21's own corpus, which needs no network, and a folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from music21 import corpus

from tokcore.algorithms.songmass.song import Song
from tokcore.integrations.music21.heads import ScoreError
from tokcore.integrations.music21.lyrics import HYPHENS
from tokcore.integrations.music21.read import Counts, read_melody, read_score

Reader = Callable[[Path], tuple[list[Song], Counts]]
SUFFIXES = (".abc", ".krn", ".mei", ".mid", ".midi", ".musicxml", ".mxl", ".xml")
# In these scanned madrigals another character stands where the hyphen was: it ends from 40 % to
# 54 % of their syllables, in the other files less than 5 %.
SCANNED_HYPHENS = {
    **dict.fromkeys((f"madrigal.3.{number}" for number in (7, 8, 13, 15, 17, 18)), "?"),
    **dict.fromkeys(("madrigal.3.5", "madrigal.3.16", "madrigal.3.19", "madrigal.5.4"), "ú"),
}
DUPLICATES = ("madrigal.3.1_old",)


class Reading(NamedTuple):
    """What one file gave: its songs, what was left out, or why it could not be read."""

    path: Path
    songs: list[Song]
    counts: Counts
    error: ScoreError | None
    seconds: float


def _read_madrigal(path: Path) -> tuple[list[Song], Counts]:
    return read_score(path, hyphens=HYPHENS + SCANNED_HYPHENS.get(path.stem, ""))


READERS: dict[str, Reader] = {
    "monteverdi": _read_madrigal,
    "trecento": read_score,
    "palestrina": read_melody,
    "ryansMammoth": partial(read_melody, measures=4),
    "essenFolksong": partial(read_melody, lines=True),
}


def corpus_songs(name: str, *, read: Reader | None = None) -> Iterator[Reading]:
    """The scores of a composer or collection in music21's corpus, in order of their paths.

    Lyrics under the notes, Italian and Latin, several voices a file: "monteverdi" (madrigals, as a
    scanner read them) and "trecento". Melodies: "palestrina" (masses, phrases end in rests),
    "ryansMammoth" (fiddle tunes, phrases of four measures), "essenFolksong" (folk songs, phrases
    are the lines of the ABC files, hundreds of tunes in each).

    A file is parsed when it is asked for, and takes seconds: take some with ``itertools.islice``,
    and keep songs with ``write_songs``. music21 keeps a parsed file in its scratch folder and is
    faster the second time.

    Args:
        name: as above, or any folder of the corpus.
        read: how a file is read, ``read_score`` or ``read_melody`` with arguments; needed for a
            folder that is not named above.

    Returns:
        An iterator of (path, songs, counts, error, seconds), one a file. A file that cannot be
        read, for want of lyrics or notes, has its ScoreError there.

    >>> from itertools import islice
    >>> for reading in islice(corpus_songs("ryansMammoth"), 2):
    ...     print(reading.path.stem, reading.counts["sentences"], reading.counts["notes"])
    42dHighlandRegimentStrathspey 7 191
    7thRegimentReel 4 115
    """
    reader = read or READERS.get(name)
    if reader is None:
        raise ValueError(
            f"corpus_songs: read must be given for a folder other than {sorted(READERS)}, got "
            f"name {name!r}"
        )
    paths = [path for path in corpus.getComposer(name) if path.stem not in DUPLICATES]
    return _readings("corpus_songs", f"the corpus folder {name!r}", paths, reader)


def folder_songs(folder: str | Path, *, read: Reader = read_score) -> Iterator[Reading]:
    """The scores of a folder and the folders in it, in order of their paths, as ``corpus_songs``.

    Files whose names do not end in .abc, .krn, .mei, .mid, .midi, .musicxml, .mxl or .xml are not
    looked at.

    Args:
        folder: where the scores are.
        read: ``read_score`` or ``read_melody``, with arguments (functools.partial) or without.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"folder_songs: {folder} is not a folder")
    return _readings("folder_songs", str(folder), Path(folder).rglob("*"), read)


def _readings(function: str, place: str, paths: Iterable[Path], read: Reader) -> Iterator[Reading]:
    found = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{function}: {place} must hold scores {SUFFIXES}, got none")
    return (_reading(path, read) for path in found)


def _reading(path: Path, read: Reader) -> Reading:
    start = time.perf_counter()
    try:
        songs, counts, error = *read(path), None
    except ScoreError as caught:
        songs, counts, error = [], Counter({"files dropped": 1}), caught
    return Reading(path, songs, counts, error, time.perf_counter() - start)
