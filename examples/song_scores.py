"""What a SongMASS model is measured by on held-out songs (see songmass.py)."""

import song_data
import torch
from song_data import DEVICE, on_device

from tokcore.algorithms.songmass import (
    END,
    PAD,
    align_song,
    alignment_accuracy,
    attention_matrix,
    collate,
    decode_melody,
    encode_line,
    generate,
    note_words,
    pair_example,
    perplexity,
    piece_words,
    real_words,
    songmass_scores,
)
from tokcore.ops import token_logprob

VOICES = 4  # a melody is written for one test song of so many: files have about that many voices


@torch.no_grad()
def perplexities(model, windows):
    """Over pieces or notes and [sep], without </s>."""
    found = {}
    for name, order in (("melody", (0, 1)), ("lyric", (1, 0))):
        logprobs = []
        for window in windows:
            pair = [window.lines[side] for side in order]
            batch = collate([pair_example(*pair)])
            example = on_device({"": batch})[""]._asdict()
            target = example.pop("target")
            kinds = ("lyric", "melody") if name == "melody" else ("melody", "lyric")
            output = model(**example, source_kind=kinds[0], target_kind=kinds[1])
            counted = (target != PAD) & (target != END)
            logprobs.append(token_logprob(output.logits, target)[counted])
        logprob = torch.cat(logprobs)
        found[f"{name}_perplexity"] = perplexity(logprob, torch.ones_like(logprob).bool())
    return found


def written(model, windows, kind, args):
    """The best of some samples for the other side of each window, and how many are unfinished."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    tokens, unfinished = [], 0
    for first in range(0, len(windows), 8):
        lines = [window.lines[kind == "lyric"] for window in windows[first : first + 8]]
        sources = collate([pair_example(line, line) for line in lines])
        found = generate(
            model,
            sources.source.to(DEVICE),
            sources.source_sentences.to(DEVICE),
            target_kind=kind,
            beam=args.samples,
            sampling=True,
            generator=rng,
            max_length=2 * song_data.LONGEST,
        )
        tokens += [row[0].tolist() for row in found.tokens]
        unfinished += sum(ended[0] != "closed" for ended in found.ended)
    return tokens, unfinished


def by_song(windows, parts):
    """The parts of windows, joined for each song."""
    songs = {}
    for window, part in zip(windows, parts, strict=True):
        songs.setdefault(window.song, []).extend(part)
    return songs


def melodies(windows, tokens):
    """(pitch, steps) of each song, and how many tokens were no notes."""
    decoded = [
        decode_melody(line, sentences=len(window.sentences))
        for window, line in zip(windows, tokens, strict=True)
    ]
    notes = [[note for sentence in one.sentences for note in sentence] for one in decoded]
    return by_song(windows, notes), sum(one.dropped for one in decoded)


def align(model, lyric, melody):
    """The alignment of a lyric line and melody tokens (with [sep]) that the attention gives."""
    source = encode_line(lyric, side="source")
    target = torch.tensor([token for token in melody if token not in (PAD, END)])
    attention = attention_matrix(
        model,
        source.tokens[None].to(DEVICE),
        source.sentences[None].to(DEVICE),
        target[None].to(DEVICE),
        target_kind="melody",
    )
    return align_song([attention[0].cpu()], [target.tolist()], [source.tokens.tolist()])


def accuracies(model, windows):
    """Of the real melodies: by attention, and by the diagonal (note i of M on piece i L / M)."""
    aligned, diagonal, real = [], [], []
    for window in windows:
        lyric, melody = (encode_line(line, side="target") for line in window.lines)
        song = align(model, window.lines[0], melody.tokens.tolist())
        for found, pieces, notes in zip(
            song.sentences, piece_words(lyric), real_words(melody), strict=True
        ):
            aligned.append(note_words(found, pieces))
            heard, of_piece = [i for i, word in enumerate(notes) if word >= 0], {}
            for rank, note in enumerate(heard):
                of_piece[note] = pieces[rank * len(pieces) // len(heard)]
            diagonal.append([(of_piece[i],) if i in of_piece else () for i in range(len(notes))])
            real.append(notes)
    return (alignment_accuracy(found, real).accuracy for found in (aligned, diagonal))


def measure(model, data, args):
    windows = data.windows["test"]
    found = perplexities(model, windows)
    sung = [window for window in windows if window.song % VOICES == 0]
    tokens, unfinished = written(model, sung, "melody", args)
    ours, malformed = melodies(sung, tokens)
    real, _ = melodies(sung, [window.lines[1] for window in sung])
    songs = [song for song in real if real[song] and ours[song]]
    scores = songmass_scores([real[song] for song in songs], [ours[song] for song in songs])
    # Of another file, so that no voice is compared with its neighbour.
    others = [songs[(i + len(songs) // 2) % len(songs)] for i in range(len(songs))]
    shuffled = songmass_scores([real[song] for song in songs], [real[song] for song in others])
    found["alignment_accuracy"], diagonal = accuracies(model, windows)
    for name, score in (("", scores), ("shuffled ", shuffled)):
        found[f"{name}PD"], found[f"{name}DD"] = score.pitch_similarity, score.duration_similarity
        found[f"{name}MD"] = score.melody_distance
    return found | {
        "diagonal accuracy": diagonal,
        "unfinished windows": unfinished,
        "malformed tokens": malformed,
    }
