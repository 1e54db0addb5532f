"""Key-value caches for the tests of what reads them, and how far rounding may take the results."""

import torch
from accuracy import HALF_ULP, ROUNDOFF, SLACK

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw_cache(sizes, dtype, *, groups=None, seed=0, spread=1.0):
    """Key and value (B, Hkv, C, D) with their quantization, None unless there are groups."""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        rows = [spread * torch.randn(sizes, generator=generator) for _ in range(2)]
        return [x.to(dtype) for x in rows], [None, None]
    rows = [torch.randint(256, sizes, generator=generator, dtype=torch.uint8) for _ in range(2)]
    pairs = torch.rand(2, *sizes[:3], groups, 2, generator=generator)
    # Scale about 1 / 64 and an offset that puts 0 among the 256 values, as quantising does.
    pairs = pairs * torch.tensor([spread / 32, -2 * spread])
    return rows, list(pairs)


def draw_query(shape, dtype, *, seed=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).to(dtype)


def draw_lists(batch, lists, capacity, listed, *, seed=2):
    """Ascending slots with garbage behind the count, and counts, the first list full."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, listed + 1, (batch, lists), generator=generator, dtype=torch.int32)
    count.view(-1)[:1] = listed
    slots = torch.rand(batch, lists, capacity, generator=generator).argsort(-1)[..., :listed]
    index = slots.sort(-1).values.to(torch.int32)
    behind = torch.arange(listed) >= count.unsqueeze(2)
    return index.masked_fill(behind, 2**31 - 1), count


def numbers(cache, pairs):
    """The entries of a cache in float64, and what their magnitude is made of."""
    if pairs is None:
        return cache.double(), cache.double().abs()
    scale, offset = pairs.double().split(1, -1)
    entries = cache.double().unflatten(-1, (pairs.shape[3], -1))
    exact, size = entries * scale + offset, entries * scale.abs() + offset.abs()
    return exact.flatten(-2), size.flatten(-2)


def unit(dtype):
    return SLACK * ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def assert_no_worse_than(names, got, plain, truth, allowed):
    """|operator - truth| <= |plain torch - truth| + bound, for each element of each result."""
    for name, *values, bound in zip(names, got, plain, truth, allowed, strict=True):
        found, was, true = (x.detach().cpu() for x in values)
        assert (found.dtype, found.shape) == (was.dtype, was.shape), name
        assert torch.equal(found.isinf(), true.isinf()), name
        relative, absolute = HALF_ULP[found.dtype]
        bound = bound + relative * true.abs() + absolute
        excess = (found.double() - true).abs() - (was.double() - true).abs() - bound
        assert bool((excess.nan_to_num(nan=-1.0)[~true.isinf()] <= 0).all()), (
            f"{name}: {excess.max()}"
        )
        assert not bool(found.isnan().any()), name
