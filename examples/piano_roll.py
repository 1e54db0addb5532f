"""A song as a piano roll: a bar for each note, its syllable below, a colour for each sentence.

    python examples/piano_roll.py SCORE [PNG]        # the first song of a score with lyrics

``draw`` draws a song into an axis, ``save`` one of any length into a PNG, row by row.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from tokcore.algorithms.songmass.song import Song

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple")
NAMES = {0: "C", 4: "E", 7: "G"}  # the lines of the grid
LANE = 11  # points between two lines of syllables
ROW = 48  # beats that a row of a page holds


def draw(song, axis, *, beat=0.0, beats=None, pitches=None, first=0):
    """Draw a song into a matplotlib axis.

    beat is where the song begins; beats how many the axis shows, from its first note on, and
    pitches the lowest and the highest, by default as the song needs; first is the number of its
    first sentence. A syllable stands below the onset of its note, in the first line that is free;
    within a word it begins with a hyphen. Unknown syllables: the word stands below its first note.
    """
    bars, syllables = [], []
    for number, sentence in enumerate(song.sentences, start=first):
        colour = COLOURS[number % len(COLOURS)]
        for word in sentence:
            for index, note in enumerate(word.notes):
                beat += note.rest
                bars.append((beat, note, colour))
                text = (word.syllables or (word.text,))[index : index + 1]
                if text and text[0]:
                    syllables.append((beat, note, ("-" if index else "") + text[0], colour))
                beat += note.duration
    low, high = pitches or (min(n.pitch for _, n, _ in bars), max(n.pitch for _, n, _ in bars))
    start = bars[0][0]
    axis.set_xlim(start - 0.5, start + beats if beats else beat + 0.5)
    axis.set_ylim(low - 1, high + 1)
    axis.set_yticks(
        [p for p in range(low, high + 1) if p % 12 in NAMES],
        [f"{NAMES[p % 12]}{p // 12 - 1}" for p in range(low, high + 1) if p % 12 in NAMES],
    )
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=8)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)
    for onset, note, colour in bars:
        axis.broken_barh(
            [(onset, note.duration)], (note.pitch - 0.4, 0.8), color=colour, edgecolor="white"
        )
    write_syllables(syllables, axis, low - 1)


def write_syllables(syllables, axis, bottom):
    """Below the axis, a line further down wherever the one above is still taken."""
    figure = axis.figure
    figure.draw_without_rendering()  # what the layout makes of the axis decides what overlaps
    taken = []
    for onset, note, syllable, colour in syllables:
        text = axis.annotate(
            syllable,
            (onset, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=8,
            color=colour,
            va="top",
            annotation_clip=False,
            parse_math=False,  # a scanner's $ is a $
        )
        box = text.get_window_extent(figure.canvas.get_renderer())
        line = next((i for i, end in enumerate(taken) if end < box.x0), len(taken))
        taken[line : line + 1] = [box.x0 + 1.1 * box.width + 3]
        text.set_position((0, -3 - LANE * line))
        axis.vlines(onset, bottom, note.pitch - 0.4, color=colour, linewidth=0.4, alpha=0.5)


def save(song, path):
    """Draw a song into a PNG, row by row: a sentence that does not fit into a row begins the next,
    and one that fits into none is cut between words.
    """
    rows, beat = [], 0.0  # a row: where it begins, with a rest; its first note; number -> sentence
    for number, sentence in enumerate(song.sentences):
        whole = beats_of(sentence) <= ROW
        for words in [sentence] if whole else [(word,) for word in sentence]:
            onset, end = beat + words[0].notes[0].rest, beat + beats_of(words)
            if not rows or end > rows[-1][1] + ROW:
                rows.append((beat, onset, {}))
            row = rows[-1][2]
            row[number] = row.get(number, ()) + words
            beat = end
    notes = [note for sentence in song.sentences for word in sentence for note in word.notes]
    pitches = min(note.pitch for note in notes), max(note.pitch for note in notes)
    ends = [row[0] for row in rows[1:]] + [beat]
    beats = max(ROW, *(end - row[1] for row, end in zip(rows, ends, strict=True))) + 1
    height = 0.9 + 0.07 * (pitches[1] - pitches[0] + 2)
    figure, axes = plt.subplots(
        len(rows), figsize=(15, height * len(rows) + 0.5), layout="constrained", squeeze=False
    )
    for (start, _, sentences), axis in zip(rows, axes[:, 0], strict=True):
        part = Song(song.name, tuple(sentences.values()))
        draw(part, axis, beat=start, beats=beats, pitches=pitches, first=next(iter(sentences)))
    figure.suptitle(song.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def beats_of(words):
    return sum(note.rest + note.duration for word in words for note in word.notes)


if __name__ == "__main__":
    from tokcore.integrations.music21 import read_score

    score = Path(sys.argv[1])
    figure = Path(sys.argv[2]) if len(sys.argv) > 2 else score.with_suffix(".png")
    songs, counts = read_score(score)
    save(songs[0], figure)
    print(f"{figure}: {songs[0].name}; {dict(counts)}")
