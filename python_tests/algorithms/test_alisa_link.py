"""The order of copies and waits on CUDA, followed on the CPU; and the copies where CUDA is."""

import contextlib

import pytest
import torch
from alisa_cases import Everything, assert_equal_to_one_tier, half, store_of

from tokcore.algorithms.alisa import Plan
from tokcore.algorithms.alisa.link import Link


class Recorder:
    """Stands for torch.cuda: notes who waits for whom, and what was copied in between."""

    def __init__(self, monkeypatch):
        self.log, recorder = [], self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                recorder.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def record(self, stream):
                recorder.log.append(f"event on {stream.name}")

            def synchronize(self):
                recorder.log.append("host waits for event")

        @contextlib.contextmanager
        def on(stream):
            recorder.log.append(f"begin {stream.name}")
            yield
            recorder.log.append(f"end {stream.name}")

        current, empty = Stream("current"), torch.empty
        copy, put = torch.Tensor.copy_, torch.Tensor.index_copy_

        def pinned(*shape, pin_memory=False, **kind):
            assert pin_memory
            return empty(*shape, **kind)

        def copied(target, source, non_blocking=False):
            recorder.log.append(f"copy, non_blocking={non_blocking}")
            return copy(target, source)

        def written(target, *arguments):
            recorder.log.append("write to the host tier")
            return put(target, *arguments)

        def lent(tensor, stream):
            recorder.log.append(f"lent to {stream.name}")

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)
        monkeypatch.setattr(torch.Tensor, "index_copy_", written)
        monkeypatch.setattr(torch.Tensor, "record_stream", lent)
        self.side = Stream("side")

    def link(self):
        link = Link(torch.device("cpu"))
        link.stream = self.side
        return link


def test_what_leaves_is_written_at_the_next_call_only(monkeypatch):
    tier, recorder = torch.zeros(4, 2), Recorder(monkeypatch)
    link = recorder.link()
    link.to_host(torch.ones(2, 2), tier, torch.tensor([3, 1]))
    assert recorder.log == [
        "side waits for current",  # that has gathered the rows
        "begin side",
        "copy, non_blocking=True",
        "lent to side",  # so that the rows' memory is not used again before
        "event on side",
        "end side",
    ]
    assert not tier.any()
    recorder.log.clear()
    link.settle()
    assert recorder.log == ["host waits for event", "write to the host tier"]
    assert tier.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    link.settle()
    assert len(recorder.log) == 2


def test_only_the_current_stream_waits_for_what_comes(monkeypatch):
    tier, recorder = torch.arange(8.0).view(4, 2), Recorder(monkeypatch)
    found = recorder.link().to_device(tier, torch.tensor([2, 0]))
    assert recorder.log == ["begin side", "end side", "current waits for side", "lent to current"]
    assert found.tolist() == [[4, 5], [0, 1]]


def test_the_store_settles_before_it_reads(monkeypatch):
    """All phases again, with every write to the host tier put off for as long as it can be."""
    recorder = Recorder(monkeypatch)
    store = store_of(Plan(0.7, 0.5, 2, 6), [9, 6], 16, half(0.4))
    store._link.stream = recorder.side
    assert assert_equal_to_one_tier(store, Everything(2, 25), [9, 6], 16, half(0.4)) == {1, 2, 3}
    assert "host waits for event" in recorder.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("inputs_on", ["host", "device"])
def test_equal_to_one_tier_on_cuda(inputs_on):
    kind = {"device": "cuda", "inputs_on": inputs_on}
    store = store_of(Plan(0.7, 0.5, 2, 6), [9, 6], 16, half(0.4), **kind)
    tokens = Everything(2, 25, device="cuda")
    assert assert_equal_to_one_tier(store, tokens, [9, 6], 16, half(0.4)) == {1, 2, 3}
