"""Syllables under notes, joined into words; words cut into sentences; verses."""

import pytest

pytest.importorskip("music21")

from music21 import articulations, note, tie
from tiny_scores import lines, sung, texts, words

from tokcore.integrations.music21 import NoLyricsError, Sentences, read_score

# --- words ---------------------------------------------------------------------------------------


def test_syllabics_join_syllables_and_a_bare_note_is_a_melisma():
    part = sung(
        (60, 1, "Glo", "begin"),
        (62, 1),
        (64, 1, "ri", "middle"),
        (65, 2, "a", "end"),
        (67, 1, "est", "single"),
    )
    assert words(part) == (
        [
            ("Gloria", ("Glo", "", "ri", "a"), (60, 62, 64, 65)),
            ("est", ("est",), (67,)),
        ],
        {"songs": 1, "sentences": 1, "words": 2, "notes": 5},
    )


@pytest.mark.parametrize("syllabic", ["single", "end", None])
@pytest.mark.parametrize("hyphen", ["-", "\u00ad", "\u2010", "\u2011", "\u2013", "--"])
def test_hyphens_join_syllables_where_syllabics_say_nothing(syllabic, hyphen):
    part = sung(
        (60, 1, "gio" + hyphen, syllabic),
        (62, 1, hyphen + "vi" + hyphen, syllabic),
        (64, 1, "netta", syllabic),
        (65, 1, "pian", syllabic),
        (65, 1, hyphen + "ta", syllabic),
    )
    assert texts(part) == ["giovinetta", "pianta"]


def test_a_lone_hyphen_or_extender_is_no_syllable():
    part = sung((60, 1, "A", "begin"), (62, 1, "-"), (64, 1, "_"), (65, 1, "men_", "end"))
    assert words(part)[0] == [("Amen", ("A", "", "", "men"), (60, 62, 64, 65))]


def test_other_hyphens_by_argument():
    part = sung((60, 1, "lú"), (62, 1, "ce"), (62, 1, "o?"), (62, 1, "ra"))
    assert texts(part) == ["lú", "ce", "o?", "ra"]
    assert texts(part, hyphens="ú?") == ["lce", "ora"]
    assert texts(part, hyphens="") == ["lú", "ce", "o?", "ra"]


def test_syllables_run_together_are_counted_and_a_hyphen_within_a_word_stays():
    found, counts = words(sung((60, 1, "que-sto-"), (62, 1)))
    assert (found, counts["syllables run together"]) == (
        [("questo", ("questo", ""), (60, 62))],
        1,
    )
    part = sung((60, 1, "a", "begin"), (62, 1, "men", "end"), (64, 1, "peut-être", "single"))
    found, counts = words(part)
    assert [word[0] for word in found] == ["amen", "peut-être"]
    assert counts["syllables run together"] == 0


def test_hyphens_that_music21_took_from_the_text():
    """In kern and MIDI "a-" begins and "-a" ends; "b-" in the middle of a word begins, too."""
    part = sung((60, 1, "a", "begin"), (60, 1, "b", "begin"), (60, 1, "c", "single"))
    assert texts(part) == ["abc"]
    part = sung((60, 1, "a", "single"), (60, 1, "b", "end"), (60, 1, "c", "single"))
    assert texts(part) == ["ab", "c"]


def test_contradicting_syllabics_are_counted():
    part = sung(
        (60, 1, "An", "middle"),  # nothing before: begins
        (60, 1, "gel", "end"),
        (60, 1, "no", "end"),  # continues what had ended
        (60, 1, "be", "begin"),
        (60, 1, "la", "begin"),  # never ended
        (60, 1, "mor", "end"),
    )
    found, counts = words(part)
    assert [word[0] for word in found] == ["Angelno", "be", "lamor"]
    assert counts["ended words continued"] == 1
    assert counts["words never ended"] == 1


def test_a_single_syllable_after_an_open_one_ends_the_word():
    """As kern and MIDI have it: "hel-" and "lo"."""
    assert texts(sung((60, 1, "hel", "begin"), (60, 1, "lo", "single"))) == ["hello"]


def test_a_word_does_not_go_on_after_a_long_rest():
    part = sung((60, 1, "A", "begin"), (0, 4), (62, 1, "more", "end"))
    found, counts = words(part)
    assert [word[0] for word in found] == ["A", "more"]
    assert counts["words never ended"] == 1
    assert texts(part, sentences=Sentences(rest=4.5)) == ["Amore"]


@pytest.mark.parametrize("text", ["co e", "co\u00a0e", "co_e", "co‿e", "co\te"])
def test_words_that_share_a_note_are_one(text):
    part = sung((60, 1, "bian", "begin"), (62, 1, text, "end"), (64, 1, "vo", "single"))
    found, counts = words(part)
    assert found[0] == ("bianco‿e", ("bian", "co‿e"), (60, 62))
    assert counts["words that share a note"] == 1


def test_composite_lyrics():
    part = sung((60, 1, "bian", "begin"), (62, 1), (64, 1, "ra", "end"))
    lyric = note.Lyric(number=1)
    lyric.components = [note.Lyric("co", syllabic="end"), note.Lyric("e", syllabic="begin")]
    part.notes[1].lyrics.append(lyric)
    found, counts = words(part)
    assert found == [("bianco‿era", ("bian", "co‿e", "ra"), (60, 62, 64))]
    assert counts["words that share a note"] == 1


@pytest.mark.parametrize("text", ["1. Ky", "1.3.7.8.\u00a0Ky", "(2)Ky", "12)Ky"])
def test_the_number_of_a_verse_is_no_word(text):
    found, counts = words(sung((60, 1, text, "begin"), (62, 1, "rie", "end")))
    assert found[0][:2] == ("Kyrie", ("Ky", "rie"))
    assert counts["verse numbers dropped"] == 1


def test_decomposed_accents_are_composed():
    assert texts(sung((60, 1, "piu\u0300"))) == ["più"]


def test_verses():
    part = sung((60, 1, "one"), (62, 1, "two"))
    for one, text in zip(part.notes, ["eins", ""], strict=True):
        one.lyrics.append(note.Lyric(text=text, number=2, syllabic="single"))
    assert words(part) == (
        [("one", ("one",), (60,)), ("two", ("two",), (62,))],
        {
            "songs": 1,
            "sentences": 1,
            "words": 2,
            "notes": 2,
            "syllables of other verses dropped": 1,
        },
    )
    found, counts = words(part, verse=2)
    assert found == [("eins", ("eins", ""), (60, 62))]
    assert counts["syllables of other verses dropped"] == 2
    with pytest.raises(NoLyricsError, match=r"lyrics of verse 3, got verses \[1, 2\]"):
        read_score(part, verse=3)
    with pytest.raises(ValueError, match="verse must be at least 1, got 0"):
        read_score(part, verse=0)


def test_a_verse_is_known_by_the_name_of_its_lyric():
    """music21 numbers part1verse2 by its place among the lyrics of a note."""
    part = sung((60, 1, "one"), (62, 1))
    part.notes[0].lyrics[0].identifier = "part1verse1"
    part.notes[1].lyrics.append(note.Lyric(text="zwei", number=1, identifier="part1verse2"))
    assert texts(part) == ["one"]
    assert texts(part, verse=2) == ["zwei"]


# --- sentences -----------------------------------------------------------------------------------


def test_a_mark_ends_a_sentence():
    part = sung(*((60, 1, text) for text in ("Ah!", "sì,", "no.»", "chi?", "io:", "e", "tu;", "è")))
    assert lines(part)[0] == ["Ah!", "sì, no.»", "chi?", "io:", "e tu;", "è"]
    assert lines(part, marks="?")[0] == ["Ah! sì, no.» chi?", "io: e tu; è"]
    assert lines(part, marks="")[0] == ["Ah! sì, no.» chi? io: e tu; è"]


def test_a_pause_at_a_comma_or_before_a_capital_ends_a_sentence():
    part = sung(
        (60, 1, "a,"), (60, 1, "B"), (0, 0.5), (60, 1, "c,"), (0, 0.5), (60, 1, "d"), (0, 0.5),
        (60, 1, "“E"), (0, 0.5), (60, 1, "f"),
    )  # fmt: skip
    assert lines(part)[0] == ["a, B c,", "d", "“E f"]
    assert lines(part, pause=1.0)[0] == ["a, B c, d “E f"]
    assert lines(part, pause=0.0)[0] == ["a,", "B c,", "d", "“E f"]


def test_a_long_rest_ends_a_sentence():
    part = sung((60, 1, "a"), (0, 3), (60, 1, "b"), (0, 4), (60, 1, "c"))
    assert lines(part)[0] == ["a b", "c"]
    assert lines(part, rest=3)[0] == ["a", "b", "c"]
    assert lines(part, rest=4.5)[0] == ["a b c"]


def test_a_breath_mark_ends_a_sentence():
    part = sung((60, 1, "a"), (60, 1), (60, 1, "b"))
    part.notes[1].articulations.append(articulations.BreathMark())
    assert lines(part)[0] == ["a", "b"]
    part.notes[0].tie, part.notes[1].tie = tie.Tie("start"), tie.Tie("stop")
    assert lines(part)[0] == ["a", "b"]


def test_a_long_sentence_is_cut_at_its_longest_silence():
    part = sung(
        (60, 1, "a"), (60, 1, "b"), (0, 0.25), (60, 1, "c"), (60, 1, "d"), (0, 1), (60, 1, "e")
    )
    assert lines(part, longest=5) == (["a b c d e"], read_score(part)[1])
    found, counts = lines(part, longest=4)
    assert (found, counts["sentences cut"]) == (["a b c d", "e"], 1)
    found, counts = lines(part, longest=3)
    assert (found, counts["sentences cut"]) == (["a b", "c d", "e"], 2)


def test_equal_silences_are_cut_nearest_the_middle():
    part = sung(*((60, 1, text) for text in "abcd"))
    assert lines(part, longest=3)[0] == ["a b", "c d"]
    part = sung((60, 1, "a"), (60, 1), (60, 1), (60, 1, "b"), (60, 1, "c"), (60, 1, "d"))
    assert lines(part, longest=4)[0] == ["a", "b c d"]
    found, counts = lines(part, longest=2)
    assert found == ["a", "b", "c d"]
    assert counts["sentences of one word too long"] == 1


@pytest.mark.parametrize(
    ("argument", "value"), [("pause", -1), ("rest", 0), ("longest", 0), ("rest", float("nan"))]
)
def test_the_rule_is_checked(argument, value):
    with pytest.raises(ValueError, match=f"Sentences: {argument} must be .* got {value}"):
        Sentences(**{argument: value})
