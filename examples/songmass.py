"""Melodies for lyrics and lyrics for melodies: SongMASS on madrigals and songs of the Trecento.

    python examples/songmass.py                     # minutes on two cores
    python examples/songmass.py --quick             # seconds: does everything run?
    python examples/songmass.py --seeds 3
    python examples/songmass.py --corpus SCORES     # your own: MusicXML, MIDI, kern, with lyrics

Needs `pip install tokcore[music,examples]`. Three small models see the same paired songs equally
often:

    full            pre-trained by masked spans (MASS) of lyrics and of melodies, fiddle tunes among
                    them; then trained in both directions with the constraint on the attention
    no pretraining  the second part alone
    no constraint   as full, with weight 0 on the constraint

Held-out songs (files that no model has seen) measure: perplexity in both directions; melodies
written for their lyrics, by the likeness of pitches (PD) and durations (DD) to the real ones and
the distance of the tunes (MD), beside melodies of other songs; the alignment of notes and words
that the attention gives, beside the diagonal. One song is written: MusicXML, MIDI, piano roll.
"""

import argparse
import json
import random
from pathlib import Path

import piano_roll
import song_data
import torch
from song_data import DEVICE, on_device
from song_scores import align, measure, written
from tqdm import tqdm

from tokcore.algorithms.songmass import (
    MELODY_SIZE,
    Song,
    SongMass,
    aligned_song,
    collate,
    decode_lyric,
    mass_example,
    pair_example,
    songmass_joint_loss,
)

METHODS = ("full", "no pretraining", "no constraint")
BATCH = 8  # windows of each objective in an update
WEIGHT = 20.0  # of the constraint: the authors' 1 takes longer to show than these runs last


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a run of seconds")
    add("--method", nargs="+", choices=METHODS, default=METHODS)
    add("--corpus", type=Path, help="a folder of scores with lyrics, instead of music21's own")
    add("--cache", type=Path, default=song_data.default_cache(), help="parsed songs are kept here")
    add("--pretrain", type=int, default=300, help="updates by masked spans")
    add("--steps", type=int, default=400, help="updates with paired songs")
    add("--width", type=int, default=96)
    add("--layers", type=int, default=2)
    add("--lr", type=float, default=1.5e-3)
    add("--samples", type=int, default=5, help="of which the best is kept, as the authors do")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="runs, from --seed on")
    add("--output", type=Path, default=Path("runs/songmass"))
    args = parser.parse_args()
    if args.quick:
        args.pretrain, args.steps, args.width, args.samples = 2, 3, 16, 1
    return args


# --- training -------------------------------------------------------------------------------------


def masked(data, rng, chooser):
    """Masked spans of lyrics (of the songs) and of melodies (of the songs, and of tunes alone)."""
    batches = {}
    for kind, size in (("lyric", len(data.vocabulary)), ("melody", MELODY_SIZE)):
        windows = data.windows["train"]
        if kind == "melody" and data.windows["melodies"]:
            windows = chooser.choice([windows, data.windows["melodies"]])
        lines = [window.lines[-1 if kind == "melody" else 0] for window in draw(windows, chooser)]
        options = {"kind": kind, "size": size, "mode": "code", "generator": rng}
        batches[kind] = collate([mass_example(line, **options) for line in lines])
    return batches


def paired(data, chooser):
    lyrics, melodies = zip(
        *(window.lines for window in draw(data.windows["train"], chooser)), strict=True
    )
    pairs = {"lyric_to_melody": (lyrics, melodies), "melody_to_lyric": (melodies, lyrics)}
    return {name: collate(list(map(pair_example, *sides))) for name, sides in pairs.items()}


def draw(windows, chooser):
    return chooser.sample(windows, min(BATCH, len(windows)))


def train(method, data, seed, args):
    torch.manual_seed(seed)
    rng, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    model = SongMass(
        len(data.vocabulary),
        MELODY_SIZE,
        width=args.width,
        heads=4,
        feed_forward=2 * args.width,
        layers=args.layers,
    ).to(DEVICE)
    weight = 0.0 if method == "no constraint" else WEIGHT
    pretrain = 0 if method == "no pretraining" else args.pretrain
    history = []
    for name, steps in (("masked", pretrain), ("paired", args.steps)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1)
        bar = tqdm(range(steps), desc=f"{method}, {name}", leave=False)
        for _ in bar:
            batches = masked(data, rng, chooser) if name == "masked" else paired(data, chooser)
            loss, metrics = songmass_joint_loss(model, on_device(batches), attention_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            history.append({"step": len(history) + 1, "loss": metrics["loss"].item()})
            bar.set_postfix(loss=f"{history[-1]['loss']:.2f}")
    return model.eval(), history


# --- one song -------------------------------------------------------------------------------------


def write_example(model, data, args):
    """The first window of the first test song: a melody, and lyrics for the real one."""
    from tokcore.integrations.music21 import write_score

    window = data.windows["test"][0]
    real = data.songs["test"][window.song]
    [melody], _ = written(model, [window], "melody", args)
    [lyric], _ = written(model, [window], "lyric", args)
    found = align(model, window.lines[0], melody)
    split = data.vocabulary.split
    pieces = [  # the song's own, those that the vocabulary does not know too
        [piece for word in real.sentences[index] if word.text for piece in split(word)]
        for index in window.sentences
    ]
    song = aligned_song(f"{real.name}, melody by SongMASS", found, pieces)
    sung = tuple(sentence for sentence in song.sentences if all(word.notes for word in sentence))
    if len(sung) < len(song.sentences):
        print(f"{len(song.sentences) - len(sung)} sentences without a note are not written")
    song = Song(song.name, sung)
    for suffix in (".musicxml", ".mid"):
        write_score(song, args.output / f"song{suffix}")
    piano_roll.save(song, args.output / "song.png")
    print(f"\nlyrics for the melody of {real.name}:")
    words = decode_lyric(lyric, data.vocabulary).sentences
    print("\n".join("  " + " ".join(sentence) for sentence in words))


# --- table ----------------------------------------------------------------------------------------

COLUMNS = ("lyric_perplexity", "melody_perplexity", "PD", "DD", "MD", "alignment_accuracy")


def print_table(runs):
    print(f"\n{'':24}" + "".join(f"{name.replace('_', ' '):>20}" for name in COLUMNS))
    methods = next(iter(runs.values()))["methods"]
    rows = {name: [run["methods"][name] for run in runs.values()] for name in methods}
    for name, several in rows.items():
        print(f"{name:24}" + "".join(f"{mean(several, key):20.3f}" for key in COLUMNS))
    several = rows[next(iter(rows))]
    baseline = [f"{mean(several, f'shuffled {key}'):20.3f}" for key in ("PD", "DD", "MD")]
    print(f"{'other songs, diagonal':64}" + "".join(baseline), end="")
    print(f"{mean(several, 'diagonal accuracy'):20.3f}   (mean of {len(runs)} seeds)")


def mean(several, key):
    return sum(found[key] for found in several) / len(several)


def main():
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in range(args.seed, args.seed + args.seeds):
        data = song_data.load(args, seed)
        print(f"seed {seed}: " + ", ".join(f"{n:,} {name}" for name, n in data.counts.items()))
        run = runs[seed] = {"methods": {}}
        for method in args.method:
            model, history = train(method, data, seed, args)
            run["methods"][method] = measure(model, data, args) | {"history": history}
            if method == args.method[0] and seed == args.seed:
                write_example(model, data, args)
    print_table(runs)
    result = {"settings": {key: str(value) for key, value in vars(args).items()}, "runs": runs}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=1))
    print(f"\nin {args.output}: song.musicxml, song.mid, song.png, metrics.json")


if __name__ == "__main__":
    main()
