"""Which columns of a batch are tokens, read off the attention mask of one forward pass."""

import torch
from torch import Tensor


def along(order: Tensor, x: Tensor) -> Tensor:
    """x (B, H, Q, D) with the tokens of each sequence in the order (B, Q)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class Padding:
    """The 2D attention mask of one forward pass, and how to make transformers' own mask of it."""

    def __init__(self, mask: Tensor | None, columns: int, build):
        self.mask, self.columns, self.build = mask, columns, build
        self._of_last: tuple[Tensor | None, Tensor | None] | None = None
        self._stock: tuple[Tensor | None] | None = None

    def of_last(self, tokens: int, length: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """How many of the last tokens are real, (B,), and their order (B, Q) with padding first.

        None where all are, and where the order is that already. Found once for all layers.
        """
        if self._of_last is None:
            self._of_last = self._find(tokens, length)
        return self._of_last

    def _find(self, tokens: int, length: Tensor | None):
        if self.mask.shape[1] != self.columns:
            raise ValueError(
                f"SparseWindowCache: attention_mask must have {self.columns} columns, those of the "
                f"cache and the new ones, got {self.mask.shape[1]}"
            )
        before, chunk = self.mask.split([self.columns - tokens, tokens], 1)
        if tokens > 1 and length is not None:  # not of each decode step: it waits for the device
            real = before.sum(1, dtype=torch.int32)
            if not torch.equal(real, length):
                raise ValueError(
                    "SparseWindowCache: attention_mask must keep its values for the tokens in the "
                    f"cache, got {real.tolist()} of them where {length.tolist()} are kept"
                )
        if bool(chunk.all()):
            return None, None
        valid = chunk.sum(1, dtype=torch.int32)
        if bool((chunk[:, 1:] >= chunk[:, :-1]).all()):
            return valid, None
        return valid, chunk.long().argsort(dim=1, stable=True)

    def stock(self) -> Tensor | None:
        if self._stock is None:
            self._stock = (self.build(),)
        return self._stock[0]
