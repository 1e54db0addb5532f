"""Copies between the memory of a device and the host's, which nobody waits for too early."""

from __future__ import annotations

import torch
from torch import Tensor


class Link:
    """Copies between the tiers: on CUDA by way of pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: list[tuple] = []  # on their way to the host tier: (event, rows, into, at)

    def to_host(self, moving: Tensor, target: Tensor, into: Tensor) -> None:
        """Send rows to target[into], there after the next ``settle``; moving is not used again."""
        if self.stream is None:
            target.index_copy_(0, into, moving)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            rows = torch.empty(moving.shape, dtype=moving.dtype, pin_memory=True)
            rows.copy_(moving, non_blocking=True)
            moving.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        self._leaving.append((event, rows, target, into))

    def settle(self) -> None:
        """Write to the host tier what has been sent."""
        for event, rows, target, into in self._leaving:
            event.synchronize()
            target.index_copy_(0, into, rows)
        self._leaving.clear()

    def to_device(self, source: Tensor, rows: Tensor) -> Tensor:
        """source[rows] on the device, for the current stream."""
        if self.stream is None:
            return source.index_select(0, rows)
        found = torch.empty((len(rows), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
        torch.index_select(source, 0, rows, out=found)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            near = found.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        near.record_stream(current)
        return near
