"""Generation with sentence control, and the attention that an alignment is read from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore.algorithms.songmass.model import (
    KINDS,
    DecoderState,
    SongMass,
    decoder_input,
    target_sentence_ids,
)
from tokcore.algorithms.songmass.tokens import END, FIRST_DURATION, PAD, SEPARATOR, SPECIALS

ENDS = ("closed", "length", "none")


class Generation(NamedTuple):
    """What generate returns: K hypotheses of each source, best first.

    tokens (B, K, T) int64 end with </s>, padded with 1; scores (B, K); sentences (B, K) int64 is
    how many are closed. ended[b][k] says why a hypothesis ended: "closed", all sentences are closed
    and </s> was written; "length", max_length came first, so sentences may be missing and the last
    may be open; "none", there is no such hypothesis, as fewer exist (score -inf).
    """

    tokens: Tensor
    scores: Tensor
    sentences: Tensor
    ended: list[list[str]]


@torch.no_grad()
def generate(
    model: SongMass,
    source: Tensor,
    source_sentences: Tensor,
    *,
    target_kind: str,
    beam: int = 5,
    sampling: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    length_penalty: float = 1.0,
    max_length: int = 500,
    melody_grammar: bool = True,
    generator: torch.Generator | None = None,
) -> Generation:
    r"""Melodies for lyrics or lyrics for melodies, with exactly as many sentences as the source.

    A step may only write what leads to a song:

    - in a sentence: words, or pitches and durations; [sep] where it has one already (the data know
      no empty sentence); never </s>, <s>, <pad>, <unk>, <mask>, [align];
    - with as many [sep] as the source has sentences: </s> and nothing else;
    - in a melody, by its grammar: a duration after a pitch or rest, and nowhere else, so [sep]
      never parts the two.

    The score of a hypothesis y of n tokens, </s> included, is the model's own, whatever was
    forbidden on the way:

    .. math::
        \frac{1}{n^\gamma} \sum\nolimits_{t = 1}^n \log p(y_t \mid y_{<t}, x)

    Beam search keeps the K best prefixes by their sum and ends for a source with its K-th closed
    hypothesis. Sampling draws K hypotheses independently from softmax(logits / temperature) over
    what is allowed, and is the authors' way.

    Args:
        model: a SongMass; it decodes in eval mode and is left in the mode it was in.
        source: (B, S) int64, of the other kind, padded with 1 on either side.
        source_sentences: (B, S) int64, ids 0, 1, ...; -1 at </s> and padding. The largest id + 1
            is the number of sentences to write.
        target_kind: "lyric" or "melody".
        beam: K, >= 1: width of the beam, or number of samples for each source. Default 5.
        sampling: sample instead of searching. Default False.
        temperature: > 0, of sampling. Default 1.
        top_k: sample among the k likeliest allowed tokens. Default None: all.
        length_penalty: gamma >= 0. Default 1: mean log-probability.
        max_length: most tokens to write, </s> included; at most the model's max_positions.
        melody_grammar: hold melodies to the grammar. Default True; the authors' code does not, and
            drops what is malformed when it evaluates.
        generator: of sampling, on the model's device. Default: torch's global one.
    Returns:
        Generation. Closed hypotheses come before those that ended by length. One generator state,
        batch and device give one result; a source's beam does not depend on its neighbours.
    Raises:
        ValueError, TypeError: a named error for a wrong setting, shape or dtype; for logits that
            are not finite, of a model that has diverged.

    >>> _ = torch.manual_seed(0)
    >>> model = SongMass(10, 152, width=8, heads=2, feed_forward=16, layers=1)
    >>> melody = torch.tensor([[67, 136, 5, 69, 137, 5, 2]])
    >>> sentences = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    >>> song = generate(model, melody, sentences, target_kind="lyric", beam=3, sampling=True)
    >>> song.ended, song.sentences
    ([['closed', 'closed', 'closed']], tensor([[2, 2, 2]]))

    Source: arXiv 2012.05168; microsoft/muzic:songmass/mass/song_sequence_generator.py.
    """
    _check(
        model,
        target_kind,
        beam,
        sampling,
        temperature,
        top_k,
        length_penalty,
        max_length,
        melody_grammar,
    )
    with _evaluating(model):
        state = model.start(
            source,
            source_sentences,
            source_kind=_other(target_kind),
            target_kind=target_kind,
            hypotheses=beam,
        )
        steps = _Steps(model, state, melody_grammar and target_kind == "melody", max_length)
        if sampling:
            found = _sample(steps, temperature, top_k, length_penalty, generator)
        else:
            found = _search(steps, length_penalty)
    tokens, scores, ended = found
    # Best first, then closed ones first: a stable sort keeps the order of the one before.
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, ended.gather(1, order).argsort(dim=1, stable=True))[:, :beam]
    tokens = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, max_length))
    longest = int((tokens != PAD).any(1).any(0).sum())
    return Generation(
        tokens[..., :longest],
        scores.gather(1, order),
        (tokens == SEPARATOR).sum(-1),
        [[ENDS[code] for code in row] for row in ended.gather(1, order).tolist()],
    )


@torch.no_grad()
def attention_matrix(
    model: SongMass, source: Tensor, source_sentences: Tensor, target: Tensor, *, target_kind: str
) -> Tensor:
    """Cross-attention of the last layer, mean over the heads, of a given target: (B, T, S).

    What the alignment between a song's notes and words is read from. The target, generated or not,
    is fed to the decoder and dropout is off. Rows of </s> and of padding are 0, as are the columns
    of other sentences.

    Args:
        model: a SongMass; left in the mode it was in.
        source, source_sentences, target_kind: as in generate.
        target: (B, T) int64 with its [sep], with or without </s>, padded with 1 on either side.
    Returns:
        (B, T, S), float32 (float64 for double); row t is that of token target[:, t].
    """
    if target_kind not in KINDS:
        raise ValueError(
            f"attention_matrix: target_kind must be one of {KINDS}, got {target_kind!r}"
        )
    with _evaluating(model):
        return model(
            source,
            decoder_input(target),
            source_kind=_other(target_kind),
            target_kind=target_kind,
            source_sentences=source_sentences,
            target_sentences=target_sentence_ids(target),
            return_attention=True,
        ).attention


class _Steps:
    """Log-probabilities of one token after another, and which of them are allowed."""

    def __init__(self, model: SongMass, state: DecoderState, paired: bool, max_length: int) -> None:
        self.model, self.state, self.paired, self.max_length = model, state, paired, max_length
        ids = state.source_sentences
        none = ids.new_full((len(ids), 1), -1)
        self.sentences = torch.cat([ids, none], 1).amax(1, keepdim=True) + 1
        self.first = torch.full_like(state.closed, END)
        self.dtype = torch.promote_types(state.keys_values[0][0].dtype, torch.float32)

    def __call__(self, latest: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, V) log-probabilities after the latest tokens (B, K), and the allowed ones."""
        logits = self.model.step(self.state, latest)
        if not bool(logits.isfinite().all()):
            raise ValueError("generate: the model's logits must be finite, got NaN or infinity")
        return logits.log_softmax(-1, dtype=self.dtype), self._allowed(
            latest.unsqueeze(-1), logits.shape[-1]
        )

    def _allowed(self, latest: Tensor, size: int) -> Tensor:
        token = torch.arange(size, device=latest.device)
        content = token >= len(SPECIALS)
        may_close = (latest != END) & (latest != SEPARATOR)
        if self.paired:
            is_open = (latest >= len(SPECIALS)) & (latest < FIRST_DURATION)
            content = content & ((token >= FIRST_DURATION) == is_open)
            may_close = may_close & ~is_open
        inside = content | (may_close & (token == SEPARATOR))
        unfinished = (self.state.closed < self.sentences).unsqueeze(-1)
        return torch.where(unfinished, inside, token == END)


def _search(steps: _Steps, length_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Beam search: tokens (B, 2K, max_length), scores and codes into ENDS (B, 2K)."""
    batch, beam = steps.first.shape
    latest = steps.first
    rows = torch.arange(batch, device=latest.device).unsqueeze(1)
    live = closed = latest.new_full((batch, beam, steps.max_length), PAD)
    total = torch.zeros(batch, beam, dtype=steps.dtype, device=latest.device)
    total[:, 1:] = -torch.inf  # one beginning, not K equal ones
    closed_score = torch.full_like(total, -torch.inf)
    done = latest.new_zeros(batch, 1, dtype=torch.bool)
    for step in range(steps.max_length):
        logprob, allowed = steps(latest)
        size = logprob.shape[-1]
        sums = torch.where(allowed, total.unsqueeze(-1) + logprob, -torch.inf)
        # Every prefix ends in at most one way, so of these at least K go on.
        best, index = sums.flatten(1).topk(2 * beam)
        parent, token = index // size, index % size
        written = live[rows, parent]
        written[..., step] = token
        is_end = token == END
        # What a source closes after its K-th must not depend on how long its neighbours take.
        ends = (is_end & ~done)[:, :beam]
        score = torch.where(ends, best[:, :beam] / (step + 1) ** length_penalty, -torch.inf)
        closed_score, kept = torch.cat([closed_score, score], 1).topk(beam)
        closed = torch.cat([closed, written[:, :beam]], 1)[rows, kept]
        done = (closed_score > -torch.inf).all(1, keepdim=True)
        going = is_end.long().argsort(dim=1, stable=True)[:, :beam]
        total, live, latest = best[rows, going], written[rows, going], token[rows, going]
        if bool((done | (total == -torch.inf).all(1, keepdim=True)).all()):
            break
        steps.state.select(parent[rows, going])
    scores = torch.cat([closed_score, total / steps.max_length**length_penalty], 1)
    absent = scores == -torch.inf
    tokens = torch.cat([closed, live], 1).masked_fill(absent.unsqueeze(-1), PAD)
    by_length = torch.arange(2 * beam, device=scores.device) >= beam
    return tokens, scores, torch.where(absent, ENDS.index("none"), by_length.long())


def _sample(
    steps: _Steps,
    temperature: float,
    top_k: int | None,
    length_penalty: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent samples: tokens (B, K, max_length), scores and codes into ENDS (B, K)."""
    latest = steps.first
    tokens = latest.new_full((*latest.shape, steps.max_length), PAD)
    total = torch.zeros(latest.shape, dtype=steps.dtype, device=latest.device)
    running = torch.ones_like(latest, dtype=torch.bool)
    for step in range(steps.max_length):
        logprob, allowed = steps(latest)
        score = torch.where(allowed, logprob, -torch.inf)
        # The best one's is 0, so that no temperature makes -inf of all.
        score = (score - score.amax(-1, keepdim=True)) / temperature
        if top_k is not None:
            best, index = score.topk(min(top_k, score.shape[-1]))
            score = torch.full_like(score, -torch.inf).scatter(-1, index, best)
        drawn = torch.multinomial(score.softmax(-1).flatten(0, 1), 1, generator=generator)
        latest = torch.where(running, drawn.view_as(latest), PAD)
        tokens[..., step] = latest
        gained = logprob.gather(-1, latest.unsqueeze(-1)).squeeze(-1)
        total = total + torch.where(running, gained, 0)
        running = running & (latest != END)
        if not bool(running.any()):
            break
    length = (tokens != PAD).sum(-1).to(total.dtype)
    return tokens, total / length**length_penalty, running.long()


def _other(kind: str) -> str:
    return KINDS[1 - KINDS.index(kind)]


@contextmanager
def _evaluating(model: SongMass) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check(
    model: SongMass,
    target_kind: str,
    beam: int,
    sampling: bool,
    temperature: float,
    top_k: int | None,
    length_penalty: float,
    max_length: int,
    melody_grammar: bool,
) -> None:
    name = "generate"
    if target_kind not in KINDS:
        raise ValueError(f"{name}: target_kind must be one of {KINDS}, got {target_kind!r}")
    most = {"beam": math.inf, "top_k": math.inf, "max_length": model.max_positions}
    for key, value in (("beam", beam), ("top_k", top_k), ("max_length", max_length)):
        if key == "top_k" and value is None:
            continue
        if (
            not isinstance(value, Integral)
            or isinstance(value, bool)
            or not 1 <= value <= most[key]
        ):
            raise ValueError(f"{name}: {key} must be an int in [1, {most[key]}], got {value!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(
            f"{name}: length_penalty must be finite and not negative, got {length_penalty}"
        )
    if not sampling and (temperature != 1 or top_k is not None):
        raise ValueError(
            f"{name}: temperature and top_k are of sampling, got {temperature} and {top_k} with "
            "sampling=False"
        )
    size = model.embedding["melody"].num_embeddings
    if melody_grammar and target_kind == "melody" and size <= FIRST_DURATION:
        raise ValueError(
            f"{name}: melody_grammar needs a melody vocabulary with durations, from "
            f"{FIRST_DURATION} on, got {size} entries"
        )
