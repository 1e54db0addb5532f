"""Scores of a few notes, and what is read from them."""

import zipfile
from xml.etree import ElementTree

from music21 import note, stream

from tokcore.integrations.music21 import Sentences, read_melody, read_score


def sung(*notes, part=None):
    """A part of (pitch, beats, text, syllabic) notes; 0 is a rest, a missing text a melisma."""
    part = stream.Part() if part is None else part
    for pitch, beats, *lyric in notes:
        one = note.Note(pitch, quarterLength=beats) if pitch else note.Rest(quarterLength=beats)
        if lyric:
            text, syllabic = (*lyric, None)[:2]
            one.lyrics.append(note.Lyric(text=text, number=1, syllabic=syllabic, applyRaw=True))
        part.append(one)
    return part


def words(part, **options):
    """[text, syllables, pitches] of every word, and the counts."""
    songs, counts = read_score(part, **options)
    [song] = songs
    found = [
        (word.text, word.syllables, tuple(one.pitch for one in word.notes))
        for sentence in song.sentences
        for word in sentence
    ]
    return found, counts


def texts(part, **options):
    return [word[0] for word in words(part, **options)[0]]


def only_notes(part):
    [song], counts = read_score(part)
    found = [n for sentence in song.sentences for word in sentence for n in word.notes]
    return found, counts


def lines(part, **rule):
    [song], counts = read_score(part, sentences=Sentences(**rule))
    return [" ".join(word.text for word in sentence) for sentence in song.sentences], counts


def phrases(source, **options):
    """The pitches of every phrase of every voice, and the counts."""
    songs, counts = read_melody(source, **options)
    return [[[w.notes[0].pitch for w in line] for line in song.sentences] for song in songs], counts


def lyrics_of_parts(path):
    """(text, syllabic) under the notes of each part, as the XML has them, first verse."""
    if path.suffix == ".mxl":
        with zipfile.ZipFile(path) as archive:
            [name] = [n for n in archive.namelist() if n.endswith("xml") and "META" not in n]
            root = ElementTree.fromstring(archive.read(name))
    else:
        root = ElementTree.parse(path).getroot()
    return [
        [
            (lyric.findtext("text"), lyric.findtext("syllabic"))
            for one in part.iter("note")
            for lyric in one.findall("lyric")[:1]
        ]
        for part in root.findall("part")
    ]
