"""What one operator's benchmark declares: inputs, variants and the least traffic they need.

Each bench_*.py under ops/ and algorithms/ holds its SUITES; run.py measures them, pytest too.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

FORWARD, BACKWARD = "forward", "forward+backward"
ONE_THREAD = "tokcore, one thread"
LOGITS = ("float32", "bfloat16")
DTYPES = {name: getattr(torch, name) for name in (*LOGITS, "float64", "int64")}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Logits, matrices, hidden states or slots (sequences, rows / sequences, vocabulary), or `rows`
    rewards."""

    name: str
    rows: int
    vocabulary: int
    sequences: int

    @property
    def steps(self):
        """Of a dynamic program over groups of rows or columns."""
        return self.rows * self.vocabulary * (self.rows // self.sequences + self.vocabulary)


SIZES = ((8, 8), (30, 30), (60, 80), (200, 200), (500, 2000))
SHAPES = {
    "llama2": Shape("Llama-2, Mistral", 2048, 32768, 8),
    "llama3": Shape("Llama-3", 512, 128256, 4),
    "qwen2.5": Shape("Qwen2.5", 256, 151936, 4),
    **{f"1e{n}": Shape(f"{10**n:,} rewards", 10**n, 1, 1) for n in range(3, 8)},
    **{
        f"{batch}x{m}x{n}": Shape(f"{batch:,} of {m} x {n}", batch * m, n, batch)
        for m, n in SIZES
        for batch in (1, 64, 4096)
        if batch * m * n * (m + n) <= 10**10  # the steps of the slowest of their operators
    },
    "8x256x512": Shape("8 of 256, width 512", 8 * 256, 512, 8),
    "2x1024x512": Shape("2 of 1024, width 512", 2 * 1024, 512, 2),
    "1x4096x1024": Shape("1 of 4,096 slots, width 1,024", 4096, 1024, 1),
    "1x16384x1024": Shape("1 of 16,384 slots, width 1,024", 16384, 1024, 1),
    "8x4096x1024": Shape("8 of 4,096 slots, width 1,024", 8 * 4096, 1024, 8),
    **{f"1x{n}x512": Shape(f"1 of {n}, width 512", n, 512, 1) for n in (2048, 4096)},
    "tiny": Shape("tiny", 64, 4096, 4),
}
MODELS = ("llama2", "llama3", "qwen2.5")
BATCHES = ("1e3", "1e4", "1e5", "1e6", "1e7")
WIDTHS = ("8x256x512", "2x1024x512")
CACHES = ("1x4096x1024", "1x16384x1024", "8x4096x1024")
PROMPTS = ("1x2048x512", "1x4096x512")
OTHERS = (*MODELS, *BATCHES, *WIDTHS, *CACHES, *PROMPTS)
MATRICES = tuple(name for name in SHAPES if name not in (*OTHERS, "tiny"))
MEASURED = (*OTHERS, *MATRICES)


@dataclasses.dataclass(frozen=True)
class Variant:
    """`function` takes the suite's inputs and returns a tensor or several, differentiable first."""

    name: str
    # "tokcore", "eager", "compile", "fused" (another library's kernel), "floor", "yardstick" (part
    # of tokcore that the whole is held against); beside alignments "authors", "loop" (plain C++),
    # "peer" (another package).
    kind: str
    function: Callable
    exact: bool = True  # float32 accuracy; what computes in bf16 is listed, but no bar counts it
    overwrites: bool = False  # the gradient goes over the logits, restored before each run
    most: float = math.inf  # Shape.steps beyond which a call would take minutes


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    # The differentiable one first: the logits, if there are any.
    inputs: Callable[[Shape, torch.dtype, torch.device], tuple[Tensor, ...]]
    variants: Callable[[torch.dtype, torch.device], list[Variant]]
    streams: int  # how many of the inputs one sweep reads; the others cost nothing beside them
    differentiated: int = 1  # how many outputs of a variant receive an upstream gradient
    kept: float = 1.0  # share of the rows that are scored; the others cost no read
    passes: Sequence[str] = (FORWARD, BACKWARD)
    shapes: Sequence[str] = MODELS
    dtypes: Sequence[str] = LOGITS
    tiny: Shape = SHAPES["tiny"]
    warm: bool = False  # see measure.WarmCpuClock

    def shape(self, name):
        return self.tiny if name == "tiny" else SHAPES[name]

    def traffic(self, inputs, pass_name):
        """Least bytes: one sweep of reads, and for the gradient another one and a write."""
        sweep = int(self.kept * sum(value.nbytes for value in inputs[: self.streams]))
        return sweep if pass_name == FORWARD else 2 * sweep + inputs[0].nbytes

    def groups(self, shapes, dtypes):
        """(shape, dtype, pass) of those asked for that are this suite's; "tiny" is every one's."""
        shapes = [name for name in shapes if name in (*self.shapes, "tiny")]
        dtypes = [name for name in dtypes if name in self.dtypes]
        return [(s, d, p) for s in shapes for d in dtypes for p in self.passes]


def suites():
    """name -> Suite, from every bench_*.py: operators, then the algorithms made of them."""
    folder = Path(__file__).parent
    files = sorted(folder.glob("ops/bench_*.py")) + sorted(folder.glob("algorithms/bench_*.py"))
    names = [f"benchmarks.{file.parent.name}.{file.stem}" for file in files]
    found = [suite for name in names for suite in importlib.import_module(name).SUITES]
    return {suite.name: suite for suite in found}


def draw_logits(shape, dtype, device, count=1, seed=0):
    """`count` logits: 3 randn, then each further one that + 0.3 randn: a policy and its reference.

    A few rows are drawn and repeated: no time depends on the values, and drawing all of them would
    take longer than measuring.
    """
    generator = torch.Generator().manual_seed(seed)
    block = 3 * torch.randn(min(shape.rows, 32), shape.vocabulary, generator=generator)
    results = []
    for i in range(count):
        rows = block + 0.3 * torch.randn(block.shape, generator=generator) if i else block
        size = (shape.rows // len(block), *block.shape)
        full = torch.empty(size, dtype=dtype, device=device).copy_(rows.to(dtype))
        results.append(full.view(shape.sequences, -1, shape.vocabulary))
    return results


def draw_scores(shape, dtype, device, seed=0):
    """A batch of matrices of uniform scores."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.sequences, shape.rows // shape.sequences, shape.vocabulary)
    return torch.rand(size, generator=generator, dtype=dtype).to(device)


def draw_target(shape, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = (shape.sequences, shape.rows // shape.sequences)
    return torch.randint(shape.vocabulary, size, generator=generator).to(device)


def draw_pairs(shape, device, seed=0):
    """Token ids, as frequent as words are, of references and of hypotheses: their beginnings, of
    which a fifth is replaced."""
    generator = torch.Generator().manual_seed(seed)
    pairs, rows, columns = shape.sequences, shape.rows // shape.sequences, shape.vocabulary
    words = 1 / torch.arange(1, 2001, dtype=torch.float64)
    drawn, others = (
        torch.multinomial(words, pairs * length, replacement=True, generator=generator)
        for length in (max(rows, columns), rows)
    )
    reference = drawn.view(pairs, -1)
    replaced = torch.rand(pairs, rows, generator=generator) < 0.2
    hypothesis = torch.where(replaced, others.view(pairs, -1), reference[:, :rows])
    return hypothesis.to(device), reference[:, :columns].contiguous().to(device)


def compiled(function):
    """torch.compile for the very shapes; an eager remainder would not be what the name says."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def on_one_thread(function):
    """Sets torch's number of threads around the call, which costs about a microsecond."""

    def call(*inputs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*inputs)
        finally:
            torch.set_num_threads(threads)

    return call


def with_one_thread(function, device):
    """The variants of an operator that runs on the threads of torch."""
    variants = [Variant("tokcore", "tokcore", function)]
    if device.type == "cpu":
        variants.append(Variant(ONE_THREAD, "tokcore", on_one_thread(function)))
    return variants


class _Head(torch.autograd.Function):
    """A tensor with a history over existing memory, like the output of a model's head: a leaf must
    not be overwritten, and making a copy would cost pages."""

    @staticmethod
    def forward(ctx, anchor, memory):
        alias = torch.empty(0, dtype=memory.dtype, device=memory.device)
        return alias.set_(memory.untyped_storage(), 0, memory.shape, memory.stride())

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Call:
    """A variant on given inputs: `prepare()`, which no clock sees, then the call itself."""

    def __init__(self, variant, suite, inputs, pass_name):
        self._function, self._differentiated = variant.function, suite.differentiated
        self._forward, self._overwrites = pass_name == FORWARD, variant.overwrites
        self._source, self._rest = inputs[0], inputs[1:]
        self._upstream = None
        if self._overwrites:
            self._memory = self._source.clone()
            self._anchor = torch.empty(0, device=self._source.device, requires_grad=True)
        else:
            self._logits = self._source.detach().requires_grad_(not self._forward)

    def prepare(self):
        if self._overwrites:
            self._memory.copy_(self._source)
            with torch.set_grad_enabled(not self._forward):
                self._logits = _Head.apply(self._anchor, self._memory)

    def __call__(self):
        # Where the gradient leaves: a function that changes its logits in place moves them on.
        edge = None if self._forward else get_gradient_edge(self._logits)
        with torch.set_grad_enabled(not self._forward):
            outputs = self._function(self._logits, *self._rest)
        if self._forward:
            return outputs
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        outputs = [o for o in outputs[: self._differentiated] if o.requires_grad]
        if self._upstream is None:
            draw = torch.Generator().manual_seed(2)
            self._upstream = [torch.rand(o.shape, generator=draw).to(o) for o in outputs]
        return torch.autograd.grad(outputs, edge, self._upstream)
