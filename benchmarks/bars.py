"""The bars that results are held to, as plain arithmetic on the JSON of run.py.

CPU: two AVX-512 cores (alignments: any two). GPU: bandwidth of a device copy, and the other
libraries' kernels.
"""

import dataclasses

from benchmarks.suite import BACKWARD, BATCHES, CACHES, FORWARD, MATRICES, MODELS, ONE_THREAD

DEFAULT, HUGE = "default", "huge pages"
TOKCORE, IN_PLACE = "tokcore", "tokcore, in place"

# Time over the floor of the same bytes: forward, gradient into fresh memory, gradient in place.
FLOOR = {
    ("token_logprob", "float32"): (1.6, 2.0, 1.5),
    ("token_logprob", "bfloat16"): (2.6, 2.6, 2.2),
    ("sequential_kl", "float32"): (1.9, 2.0, 1.8),
    ("sequential_kl", "bfloat16"): (2.8, 2.8, 2.6),
}
# bfloat16 bars hold at V = 32768; they are 15 % wider at V = 151936, and in proportion between.
NARROW, WIDE, WIDER = 32768, 151936, 0.15

COMPILE = {DEFAULT: 1.5, HUGE: 1.5}  # at least this much faster than the best torch.compile variant
EAGER = {DEFAULT: 5.0, HUGE: 2.5}  # than the fastest plain torch of the same accuracy
AUTHORS = 8.0  # than the authors' TDPO formula
SPARE_MB = 1.0  # above the inputs, and the gradient where there is a fresh one
TDPO_LOGITS = 0.52  # of one float32 logits tensor, bf16 inputs
POLICY = 1.15  # of the time that token_logprob takes of it
YARDSTICKS = {TOKCORE: "token_logprob", IN_PLACE: "token_logprob, in place"}
ADVANTAGES = ("group_advantage", "group_advantage_runs", "group_advantage_ids")
READS = {"group_advantage": 3.0, "group_advantage_runs": 3.0}  # of one read of the inputs,
READ_ROWS = 10**7  # of this many rewards
COPY = 0.85  # of a device copy's bandwidth, from this vocabulary on
COPY_VOCABULARY = 32768
LEVEL = 0.95  # "level" with the best other kernel: within the spread of medians

ALIGN_SHAPE, ALIGN_MS = "1x60x80", 0.5  # monotonic_align on one thread
LOOP = 1.5  # times faster than the plain loop there
SCALING_SHAPE, SCALING = "64x60x80", 1.8  # times faster on (two) threads than on one
PEERS = ("dtw", "monotonic_search")  # faster than every package on batches of
PEER_BATCH = "64x"
BACK_POINTERS = 4.0  # bytes a cell, at most, of all that PEERS take of
BACK_POINTERS_SHAPE = "1x500x2000"
# Of the read stream, on all threads: attention to all slots of a cache, to a packed fifth of them.
STREAM = {"sparse_decode_attention": 0.7, "sparse_decode_attention_packed": 0.6}
SACREBLEU = 100.0  # times faster than its TER, on one thread


@dataclasses.dataclass(frozen=True)
class Bar:
    rule: str
    suite: str
    group: str
    allocator: str
    value: float
    relation: str
    limit: float
    noisy: bool

    @property
    def passed(self):
        if self.relation == "<=":
            return self.value <= self.limit
        return self.value >= self.limit


def evaluate(documents):
    """Bars of the JSON documents of all suites, in their order. Tiny shapes have none, and neither
    has the attention of segments."""
    bars = []
    for document in documents:
        for allocator, run in document["runs"].items():
            for key, group in run["groups"].items():
                shape, dtype, pass_name = key.split()
                where = (document["suite"], key, allocator)
                check = _Check(where, dtype, pass_name, group, bars)
                if shape in MATRICES and ONE_THREAD in group["variants"]:
                    check.alignment(shape)
                if shape in CACHES and dtype in ("float32", "bfloat16"):
                    check.cache()
                if shape not in (*MODELS, *BATCHES):
                    continue
                check.memory()
                if "device copy" in group["variants"]:
                    check.gpu()
                else:
                    check.floor()
                    check.speed()
    return bars


class _Check:
    """The bars of one group."""

    def __init__(self, where, dtype, pass_name, group, bars):
        self._suite, self._key, self._allocator = where
        self._dtype, self._pass, self._group, self._bars = dtype, pass_name, group, bars
        self._variants = {n: row for n, row in group["variants"].items() if "ms" in row}

    def _add(self, rule, value, relation, limit):
        noisy = bool(self._group["noise"].get("noisy"))
        bar = (rule, self._suite, self._key, self._allocator)
        self._bars.append(Bar(*bar, round(value, 3), relation, round(limit, 3), noisy))

    def _fastest(self, kind):
        rows = self._variants.values()
        return min(
            (row["ms"] for row in rows if row["kind"] == kind and row["exact"]), default=None
        )

    def floor(self):
        if self._suite in READS and self._group["rows"] == READ_ROWS:
            ratio = self._variants[TOKCORE]["floor_ratio"]
            self._add("reads of its inputs", ratio, "<=", READS[self._suite])
        limits = FLOOR.get((self._suite, self._dtype))
        if limits is None:
            return
        wider = 1.0
        if self._dtype == "bfloat16":
            wider += WIDER * (self._group["vocabulary"] - NARROW) / (WIDE - NARROW)
        forward, fresh, in_place = (limit * wider for limit in limits)
        ratio = {name: row["floor_ratio"] for name, row in self._variants.items()}
        if self._pass == FORWARD:
            self._add("forward over floor", ratio[TOKCORE], "<=", forward)
            return
        if self._allocator == HUGE:
            self._add("fresh gradient over floor", ratio[TOKCORE], "<=", fresh)
        self._add("in place over floor", ratio[IN_PLACE], "<=", in_place)

    def speed(self):
        ours = self._variants[TOKCORE]["ms"]
        if (compiled := self._fastest("compile")) is not None:
            limit = COMPILE[self._allocator]
            self._add("faster than torch.compile", compiled / ours, ">=", limit)
        if (eager := self._fastest("eager")) is not None:
            if self._suite == "tdpo":
                self._add("faster than the authors' TDPO", eager / ours, ">=", AUTHORS)
            elif self._suite in ADVANTAGES:
                self._add("faster than vectorised torch", eager / ours, ">=", 1.0)
            else:
                self._add("faster than plain torch", eager / ours, ">=", EAGER[self._allocator])

        for name, part in YARDSTICKS.items():
            if part in self._variants:
                ratio = self._variants[name]["ms"] / self._variants[part]["ms"]
                self._add(f"{name}, over token_logprob", ratio, "<=", POLICY)

    def memory(self):
        if self._allocator != DEFAULT:
            return  # a peak in pages of 2 MB says nothing about 1 MB
        if self._suite in ADVANTAGES:
            return  # a few bytes a reward, the result among them
        peak, gradient = self._variants[TOKCORE]["peak_mb"], self._group["gradient_mb"]
        if self._suite == "tdpo":
            if self._dtype == "bfloat16":
                share = peak / self._group["float32_logits_mb"]
                self._add("TDPO peak, float32 logits", share, "<=", TDPO_LOGITS)
        else:
            self._add("peak above inputs and gradient, MB", peak - gradient, "<=", SPARE_MB)
        if self._pass == BACKWARD:
            peak = self._variants[IN_PLACE]["peak_mb"]
            self._add("peak in place, MB", peak, "<=", SPARE_MB)

    def alignment(self, shape):
        """Of the operators on batches of matrices or of pairs, on the CPU."""
        one, ours = (self._variants[name]["ms"] for name in (ONE_THREAD, TOKCORE))
        if self._suite == "monotonic_align" and shape == ALIGN_SHAPE:
            self._add("ms on one thread", one, "<=", ALIGN_MS)
            self._add("one thread, over the plain loop", self._fastest("loop") / one, ">=", LOOP)
        if self._suite == "monotonic_align" and shape == SCALING_SHAPE:
            self._add("all threads, over one", one / ours, ">=", SCALING)
        peer = self._fastest("peer")
        if self._suite in PEERS and shape.startswith(PEER_BATCH) and peer is not None:
            self._add("faster than every package", peer / ours, ">=", 1.0)
        if self._suite in PEERS and shape == BACK_POINTERS_SHAPE and self._allocator == DEFAULT:
            cells = self._group["rows"] * self._group["vocabulary"]
            peak = 1e6 * self._variants[ONE_THREAD]["peak_mb"] / cells
            self._add("peak a cell, bytes", peak, "<=", BACK_POINTERS)
        if self._suite == "ter" and peer is not None:
            self._add("one thread, over sacrebleu", peer / one, ">=", SACREBLEU)

    def cache(self):
        """Of attention to a key-value cache, on the CPU: nothing but the cache is worth a read."""
        if self._suite in STREAM and "floor_ratio" in self._variants[TOKCORE]:
            share = 1 / self._variants[TOKCORE]["floor_ratio"]
            self._add("share of the read stream", share, ">=", STREAM[self._suite])

    def gpu(self):
        ours = self._variants[TOKCORE]
        if self._suite != "tdpo" and self._group["vocabulary"] >= COPY_VOCABULARY:
            share = ours["gb_s"] / self._variants["device copy"]["gb_s"]
            self._add("share of a device copy", share, ">=", COPY)
        others = [self._fastest(kind) for kind in ("fused", "compile", "eager")]
        best = min((ms for ms in others if ms is not None), default=None)
        if best is not None:
            limit = LEVEL if self._suite == "token_logprob" else 1.0
            self._add("faster than the best other", best / ours["ms"], ">=", limit)
