"""Real scores, files of every format, melodies, the corpus and folders."""

import doctest
import importlib
from collections import Counter
from functools import partial
from itertools import islice

import pytest

pytest.importorskip("music21")

from music21 import common, note, stream
from tiny_scores import lyrics_of_parts, phrases, sung

from tokcore.algorithms.songmass.song import Note, Song, Word
from tokcore.integrations.music21 import (
    NoLyricsError,
    ScoreError,
    corpus_songs,
    folder_songs,
    read_melody,
    read_score,
)
from tokcore.integrations.music21.corpus import READERS

CORPUS = common.getCorpusFilePath()


# --- real scores ---------------------------------------------------------------------------------


def test_a_madrigal_word_for_word():
    path = CORPUS / "monteverdi" / "madrigal.4.1.mxl"
    songs, counts = read_score(path)
    names = ["Canto", "Quinto", "Alto", "Tenor", "Basso"]
    assert [song.name for song in songs] == [
        f"madrigal.4.1/{index} {name}" for index, name in enumerate(names, start=1)
    ]
    written = lyrics_of_parts(path)
    for song, syllables in zip(songs, written, strict=True):
        read = [s for line in song.sentences for word in line for s in word.syllables if s]
        assert read == [text.strip().strip("-").replace("-", "") for text, _ in syllables]
    closed = sum(not text.endswith("-") for part in written for text, _ in part)
    last_open = sum(part[-1][0].endswith("-") for part in written)
    assert counts["words"] == closed + last_open + counts["words never ended"]
    # "Ah, dolente partita", as the scanner read it
    first = songs[0].sentences[0]
    assert [word.text for word in first] == ["Ah,", "doIente", "pariiia,"]
    assert [word.syllables for word in first] == [
        ("Ah,", ""),
        ("do", "Ien", "te"),
        ("par", "ii", "ia,"),
    ]
    assert first[0].notes == (Note(76, 4.0), Note(76, 2.0))
    assert songs[0].sentences[4][0].notes[0].rest == 18.0
    assert counts["notes"] == sum(len(list(notes_of(song))) for song in songs)


def notes_of(song):
    return (one for line in song.sentences for word in line for one in word.notes)


def test_a_gloria_word_for_word():
    path = CORPUS / "trecento" / "PMFC_13_12-Gloria.xml"
    songs, counts = read_score(path)
    written = [syllables for syllables in lyrics_of_parts(path) if syllables]
    assert len(songs) == len(written) == 2
    for song, syllables in zip(songs, written, strict=True):
        text = "".join(s + " " * (kind in ("single", "end")) for s, kind in syllables)
        assert [word.text for line in song.sentences for word in line] == text.split()
    said = [" ".join(word.text for word in line) for line in songs[0].sentences]
    assert said[:4] == [
        "Et in terra pax hominibus bonae voluntatis.",
        "Laudamus te.",
        "Benedicimus te.",
        "Adoramus te.",
    ]
    assert said[-1] == "Amen."
    assert counts["chord notes dropped"] == 2  # the divided last note, tied
    assert counts["voices without lyrics dropped"] == 1


@pytest.mark.parametrize("module", ["corpus", "heads", "lyrics", "read", "write"])
def test_docstrings(module):
    """Here, because pytest looks for no docstrings in tokcore/integrations."""
    loaded = importlib.import_module(f"tokcore.integrations.music21.{module}")
    tested = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tested.failed == 0
    assert tested.attempted > 0 or module in ("heads", "lyrics")  # what is not for users


# --- files ---------------------------------------------------------------------------------------

KERN = """**kern\t**text
*staff1\t*staff1
*M3/4\t*
=1\t=1
{4c\tKy-
[4d\t-ri-
=2\t=2
4d]\t.
2e}\t-e
=3\t=3
8eq\t.
{4f\te-
8r\t.
8g}\t-le.
*-\t*-
"""
XML = """<?xml version="1.0" encoding="UTF-8"?>
<score-partwise version="4.0">
 <part-list><score-part id="P1"><part-name>Canto</part-name></score-part></part-list>
 <part id="P1">
  <measure number="1">
   <attributes><divisions>6</divisions><time><beats>2</beats><beat-type>4</beat-type></time></attributes>
   <note><rest/><duration>6</duration></note>
   <note><pitch><step>C</step><octave>5</octave></pitch><duration>2</duration>
    <time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>
    <lyric number="1"><syllabic>begin</syllabic><text>cie</text></lyric></note>
   <note><pitch><step>D</step><octave>5</octave></pitch><duration>4</duration>
    <time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>
    <lyric number="1"><syllabic>end</syllabic><text>lo</text><elision>‿</elision>
     <syllabic>single</syllabic><text>e</text></lyric></note>
  </measure>
  <measure number="2">
   <note><pitch><step>E</step><alter>-1</alter><octave>5</octave></pitch><duration>12</duration>
    <lyric number="1"><syllabic>single</syllabic><text>sol.</text></lyric></note>
  </measure>
 </part>
</score-partwise>
"""


def test_musicxml(tmp_path):
    path = tmp_path / "cielo.musicxml"
    path.write_text(XML, encoding="utf-8")
    [song], _ = read_score(path)
    sky = Word("cielo‿e", (Note(72, 1 / 3, rest=1.0), Note(74, 2 / 3)), ("cie", "lo‿e"))
    assert song == Song("cielo", ((sky, Word("sol.", (Note(75, 2.0),), ("sol.",))),))


def test_kern(tmp_path):
    path = tmp_path / "kyrie.krn"
    path.write_text(KERN)
    [song], counts = read_score(path)
    kyrie = Word("Kyrie", (Note(60, 1.0), Note(62, 2.0), Note(64, 2.0)), ("Ky", "ri", "e"))
    assert song == Song(
        "kyrie", ((kyrie, Word("ele.", (Note(65, 1.0), Note(67, 0.5, 0.5)), ("e", "le."))),)
    )
    assert (counts["grace notes dropped"], counts["tied notes merged"]) == (1, 1)

    [melody], counts = read_melody(path)
    assert [[word.notes[0].pitch for word in line] for line in melody.sentences] == [
        [60, 62, 64],
        [65, 67],
    ]
    assert counts["words"] == 5
    assert all(word.text == "" for line in melody.sentences for word in line)


@pytest.mark.parametrize(
    ("syllables", "said"),
    [
        (("glo-", "ria ", "Dio\r", "e"), [["gloria", "Dio"], ["e"]]),
        (("glo", "ria ", "a ", "te. "), [["gloria", "a", "te."]]),
        (("glo", "ria", " a", " te."), [["gloria", "a", "te."]]),
        (("glo-", "-ria", "a\n", "te."), [["gloria", "a"], ["te."]]),
        (("glo-", "ria", "\ra", "te."), [["gloria"], ["a", "te."]]),
    ],
)
def test_lyrics_of_a_midi_file(tmp_path, syllables, said):
    path = tmp_path / "song.mid"
    part = sung(*((60 + 2 * index, 1 / 3) for index in range(4)))
    for one, syllable in zip(part.notes, syllables, strict=True):
        one.lyrics.append(note.Lyric(text=syllable, applyRaw=True))
    stream.Score([part]).write("midi", path)
    [song], _ = read_score(path)
    assert [[word.text for word in line] for line in song.sentences] == said
    assert [one.duration for one in notes_of(song)] == [1 / 3] * 4


def test_a_lyric_of_a_midi_file_away_from_any_note(tmp_path):
    path = tmp_path / "song.mid"
    track = b"\0\xff\x05\2la\0\x90\x3c\x40\x60\x80\x3c\0\x81\x70\xff\x05\2xx\0\xff\x2f\0"
    path.write_bytes(b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk" + len(track).to_bytes(4, "big") + track)
    [song], counts = read_score(path)
    assert song == Song("song", ((Word("la", (Note(60, 0.2),), ("la",)),),))  # 96 of 480 ticks
    assert counts["lyrics away from any note dropped"] == 1


def test_scores_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_score: .*none\.xml is not a file"):
        read_score(tmp_path / "none.xml")
    for name, content in (
        ("cut.musicxml", XML[:700].encode()),
        ("not utf-8.musicxml", XML.replace("‿", "\u00f2").encode("latin-1")),
        ("empty.mid", b""),
        ("text.mid", b"no midi at all"),
        ("folder.mxl", b"PK\x03\x04"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ScoreError, match=rf"read_melody: .*{name} must be a score"):
            read_melody(path)
    path = tmp_path / "silent.musicxml"
    path.write_text(XML.replace("lyric", "notation"), encoding="utf-8")
    with pytest.raises(NoLyricsError, match=r"silent.musicxml must have lyrics of verse 1"):
        read_score(path)
    with pytest.raises(ScoreError, match=r"read_melody: .* must have notes, got none"):
        read_melody(sung((0, 4)))


# --- melodies ------------------------------------------------------------------------------------


def test_melodies_end_their_phrases_where_they_rest():
    part = sung((60, 1), (62, 1), (0, 1), (64, 1), (0, 2), (65, 1), (67, 1))
    assert phrases(part)[0] == [[[60, 62, 64], [65, 67]]]
    assert phrases(part, rest=1)[0] == [[[60, 62], [64], [65, 67]]]
    found, counts = phrases(part, longest=2)
    assert (found, counts["sentences cut"]) == ([[[60, 62], [64], [65, 67]]], 1)
    for name in ("rest", "measures", "longest"):
        with pytest.raises(ValueError, match=f"read_melody: {name} must be positive, got 0"):
            read_melody(part, **{name: 0})


TUNES = """X:1
T: First
M: 2/4
L: 1/4
K: C
c | de | f-
f | ga | _b2-
b

X:2
T: Second
M: 2/4
L: 1/4
K: G
[ce]z | {d}e"Am"f |
% a comment
(3abc d2 |
"""


def test_measures_of_a_tune_with_an_upbeat(tmp_path):
    (tmp_path / "tunes.abc").write_text(TUNES)
    found, counts = phrases(tmp_path / "tunes.abc", measures=2)
    assert found == [[[72, 74, 76, 77], [79, 81, 82]], [[76, 76, 78], [81, 83, 72, 74]]]
    assert (counts["songs"], counts["tied notes merged"], counts["grace notes dropped"]) == (
        2,
        2,
        1,
    )


def test_lines_of_an_abc_file(tmp_path):
    (tmp_path / "tunes.abc").write_text(TUNES)
    found, counts = phrases(tmp_path / "tunes.abc", lines=True)
    assert found == [[[72, 74, 76, 77], [79, 81, 82]], [[76, 76, 78], [81, 83, 72, 74]]]
    songs, _ = read_melody(tmp_path / "tunes.abc")
    assert [song.name for song in songs] == ["tunes/1 First", "tunes/2 Second"]


def test_phrases_that_do_not_fit_are_not_used(tmp_path):
    path = tmp_path / "odd.abc"
    path.write_text("X:1\nM: 3/4\nL: 1/4\nK: C\nV:1\nCDE\nV:2\nEFG\n")
    found, counts = phrases(path, lines=True)
    assert found == [[[60, 62, 64]], [[64, 65, 67]]]
    assert counts["voices whose written phrases do not fit"] == 2


# --- the corpus and folders ----------------------------------------------------------------------


def test_corpus_songs():
    [first, second] = islice(corpus_songs("monteverdi"), 2)
    assert (first.path.stem, second.path.stem) == ("madrigal.3.1", "madrigal.3.10")
    assert len(first.songs) == len(second.songs) == 5
    assert first.error is None
    assert first.seconds > 0
    [tune] = islice(corpus_songs("ryansMammoth", read=partial(read_melody, measures=1)), 1)
    assert len(tune.songs[0].sentences) > 16
    with pytest.raises(ValueError, match=r"corpus_songs: read must be given for .* 'bach'"):
        corpus_songs("bach")
    with pytest.raises(FileNotFoundError, match="corpus folder 'nobody' must hold scores"):
        corpus_songs("nobody", read=read_score)


def test_a_folder_of_the_corpus_holds_each_score_once():
    stems = [one.path.stem for one in corpus_songs("monteverdi", read=lambda path: ([], Counter()))]
    assert len(stems) == 48
    assert "madrigal.3.1_old" not in stems


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("madrigal.3.15", "mie giustefurie, forsenaatogxrante;"),  # giu? ?ste? fu? rie, ...
        ("madrigal.3.16", "oh lasso me, dove restaro Ie re Iiqute del corpog hello.‿g easto?"),
    ],
)
def test_what_stands_for_hyphens_in_some_scans(name, line):
    songs, _ = READERS["monteverdi"](CORPUS / "monteverdi" / f"{name}.mxl")
    assert [" ".join(word.text for word in one) for one in songs[0].sentences][1] == line


def test_folder_songs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.krn").write_text(KERN)
    (tmp_path / "deep" / "c.musicxml").write_text(XML, encoding="utf-8")
    (tmp_path / "a.xml").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("not a score")
    bad, kyrie, sky = folder_songs(tmp_path)
    assert [bad.path.name, kyrie.path.name, sky.path.name] == ["a.xml", "b.krn", "c.musicxml"]
    assert (bad.songs, bad.counts) == ([], {"files dropped": 1})
    assert "a.xml must be a score that music21 reads" in str(bad.error)
    assert [kyrie.songs[0].name, sky.songs[0].name] == ["b", "c"]
    with pytest.raises(NotADirectoryError, match=r"folder_songs: .*nothing is not a folder"):
        folder_songs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold scores"):
        folder_songs(tmp_path / "empty")
