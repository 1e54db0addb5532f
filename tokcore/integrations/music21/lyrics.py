"""Syllables under note heads, joined into words; words cut into sentences."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from music21 import note

from tokcore.algorithms.songmass.song import Note, Word
from tokcore.integrations.music21.heads import Head

HYPHENS = "-\u00ad\u2010\u2011\u2013"  # U+00AD, the soft hyphen, is common in old files
ELISION = "\u203f"  # ‿ between the words that share a note


@dataclass(frozen=True)
class Sentences:
    """Where a sentence ends: after a word for which one of these holds.

    Args:
        marks: it ends in one of these characters; quotes and brackets behind them do not matter.
        pause: it ends in a comma, or the next word begins with a capital, and at least this
            silence (beats) parts the two.
        rest: at least this silence (beats) follows. A word does not go on after such a rest, and
            notes without a syllable behind it belong to no word: they are dropped and counted.
        longest: most notes of a sentence. A longer one is cut at its longest silence between two
            words, of equal ones at that nearest the middle, until every piece is short enough or
            a single word.

    A breath mark in the score, and a line end in a MIDI lyric, end a sentence always.
    """

    marks: str = ".!?:;"
    pause: float = 0.5
    rest: float = 4.0
    longest: int = 64

    def __post_init__(self) -> None:
        if not self.pause >= 0:
            raise ValueError(f"Sentences: pause must be beats, not negative, got {self.pause}")
        if not self.rest > 0:
            raise ValueError(f"Sentences: rest must be positive beats, got {self.rest}")
        if not self.longest >= 1:
            raise ValueError(f"Sentences: longest must be at least one note, got {self.longest}")


AS_MARKED = Sentences(marks="", pause=math.inf, rest=math.inf, longest=2**31)


@dataclass
class _Syllable:
    text: str
    begins: bool  # says that it begins a word
    continues: bool  # says that it continues one
    goes_on: bool  # says that another follows
    ends_line: bool


@dataclass
class SungWord:
    """A word while it is put together, with times that Word does not have."""

    heads: list[Head] = field(default_factory=list)
    syllables: list[str] = field(default_factory=list)
    goes_on: bool = False
    ends_sentence: bool = False

    def word(self, silent_since: Fraction) -> Word:
        notes = []
        for head in self.heads:
            rest = float(head.onset - silent_since)
            notes.append(Note(head.pitch, float(head.end - head.onset), rest))
            silent_since = head.end
        return Word("".join(self.syllables), tuple(notes), tuple(self.syllables))


def verse_of(lyric: note.Lyric) -> int:
    """A lyric's verse: the number in a name as part1verse2, which music21 does not look at."""
    named = re.search(r"(\d+)$", lyric.identifier) if isinstance(lyric.identifier, str) else None
    return int(named[1]) if named else lyric.number


def sung_words(
    heads: list[Head], verse: int, hyphens: str, rest: float, counts: Counter[str]
) -> list[SungWord]:
    """The words of a verse; a note without a syllable continues the one before."""
    chosen = []
    for head in heads:
        own = [lyric for lyric in head.lyrics if verse_of(lyric) == verse and lyric.text]
        others = sum(bool(lyric.text) for lyric in head.lyrics) - len(own)
        counts["syllables of other verses dropped"] += others + len(own[1:])
        chosen.append(own[0] if own else None)
    syllables = _syllables(chosen, hyphens, counts)
    words: list[SungWord] = []
    silent_since, lost = Fraction(0), False
    for head, syllable in zip(heads, syllables, strict=True):
        lost = lost or not words or head.onset - silent_since >= rest
        last = words[-1] if words else None
        if syllable is None and lost:
            counts["notes without a syllable dropped"] += 1
            continue
        silent_since = head.end
        if syllable is None:
            last.heads.append(head)
            last.syllables.append("")
        else:
            if lost:
                counts["words never ended"] += last is not None and last.goes_on
            if lost or not _joins(last, syllable, counts):
                last = SungWord()
                words.append(last)
            last.heads.append(head)
            last.syllables.append(syllable.text)
            last.goes_on = syllable.goes_on
            last.ends_sentence |= syllable.ends_line
        last.ends_sentence |= head.breath
        lost = False
    return words


def _joins(last: SungWord, syllable: _Syllable, counts: Counter[str]) -> bool:
    counts["words never ended"] += last.goes_on and syllable.begins
    counts["ended words continued"] += syllable.continues and not last.goes_on
    return syllable.continues or (last.goes_on and not syllable.begins)


def _syllables(
    lyrics: list[note.Lyric | None], hyphens: str, counts: Counter[str]
) -> list[_Syllable | None]:
    """Three ways to say where a word ends; a voice uses one of them.

    Spaces around a word (MIDI); what music21 calls syllabic, where it is both said that a word
    begins and that one ends; else hyphens, which music21 may have taken from the text and called
    begin or end. Where every syllable says that it ends a word (scanned scores), none does.
    """
    sung = [lyric for lyric in lyrics if lyric is not None]
    spaced = any(lyric.text.strip("\r\n") != lyric.text.strip() for lyric in sung)
    said = {part.syllabic for lyric in sung for part in _components(lyric)}
    syllabic = "begin" in said and bool(said & {"middle", "end"})
    found: list[_Syllable | None] = []
    last, closed = None, True
    for lyric in lyrics:
        components = _components(lyric) if lyric is not None else []
        text = _clean(ELISION.join(part.text.strip() for part in components), hyphens, counts)
        if not text:
            found.append(None)
            continue
        raw, bare = lyric.text, lyric.text.strip()
        begins = components[0].syllabic == "begin"
        continues = components[0].syllabic in ("middle", "end") and said != {"end"}
        continues |= bare.startswith(tuple(hyphens))
        goes_on = components[-1].syllabic in ("begin", "middle") or bare.endswith(tuple(hyphens))
        if spaced:
            begins = closed or raw[0].isspace()
            closed = raw[-1].isspace()
            continues, goes_on = not begins, not closed
        elif not syllabic:
            begins = False
            joined = "".join(one for one in text if one not in hyphens)
            counts["syllables run together"] += joined != text
            text = joined
        counts["words that share a note"] += text.count(ELISION)
        if last is not None and raw[0] in "\r\n":
            last.ends_line = True
        last = _Syllable(text, begins, continues, goes_on, raw[-1] in "\r\n")
        found.append(last)
    return found


def _components(lyric: note.Lyric) -> list[note.Lyric]:
    return [part for part in lyric.components or () if part.text] or [lyric]


def _clean(text: str, hyphens: str, counts: Counter[str]) -> str:
    """Without hyphens and extenders at its ends and the number of a verse; ‿ for inner gaps."""
    text = unicodedata.normalize("NFC", text).strip(hyphens + "_" + ELISION + " \t\r\n\u00a0")
    numbered = re.match(r"\(?(\d+[.)])+[\s‿]*", text)
    if numbered:
        counts["verse numbers dropped"] += 1
        text = text[numbered.end() :]
    return re.sub(r"[\s_‿]+", ELISION, text)


def cut(words: list[SungWord], rule: Sentences, counts: Counter[str]) -> list[list[SungWord]]:
    """Words, at least one, cut into sentences."""
    found = [[words[0]]]
    for before, word in pairwise(words):
        if _ends(before, word, rule):
            found.append([])
        found[-1].append(word)
    return [piece for sentence in found for piece in shorten(sentence, rule.longest, counts)]


def _ends(word: SungWord, following: SungWord, rule: Sentences) -> bool:
    text = "".join(word.syllables).rstrip("\"'»”’)]}")
    capital = "".join(following.syllables).lstrip("\"'«“‘([{¿¡")[:1].isupper()
    silence = following.heads[0].onset - word.heads[-1].end
    return (
        word.ends_sentence
        or text.endswith(tuple(rule.marks))
        or silence >= rule.rest
        or (silence >= rule.pause and (text.endswith(",") or capital))
    )


def shorten(sentence: list[SungWord], longest: int, counts: Counter[str]) -> list[list[SungWord]]:
    """A sentence in pieces of at most ``longest`` notes."""
    before = [0]
    for word in sentence:
        before.append(before[-1] + len(word.heads))
    if before[-1] <= longest or len(sentence) == 1:
        counts["sentences of one word too long"] += before[-1] > longest
        return [sentence]
    counts["sentences cut"] += 1
    middle = max(
        range(1, len(sentence)),
        key=lambda at: (
            sentence[at].heads[0].onset - sentence[at - 1].heads[-1].end,
            -abs(2 * before[at] - before[-1]),
        ),
    )
    return [
        piece
        for part in (sentence[:middle], sentence[middle:])
        for piece in shorten(part, longest, counts)
    ]
