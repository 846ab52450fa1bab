"""The cases that gpu.py measures. Imports neither JAX nor PyTorch: each runs in its own process.

A program holds many calls of one implementation and is replayed. Every call has its own operands
and result buffers, so that the L2 cache holds nothing that it needs. The calls run one after the
other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
# Four times the largest L2 cache of any GPU (126 MB, B200).
ROTATED_BYTES = 2**29
MOST_CALLS = 64
GATE_WORDS = {"cpu": 2**20, "gpu": 2**30}
ROW = 1024


class Case(NamedTuple):
    """One computation. `reduction` is "mean", "rows" (axis=-1), "none" or "weighted".

    "weighted" is a mean of weighted losses that the user computes: XLA may fuse the operations
    around the losses.
    """

    mode: str
    reduction: str
    logits: str
    labels: str
    power: int

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.reduction}"

    @property
    def dtype(self) -> str:
        return f"{self.logits}, {self.labels} labels"

    @property
    def n(self) -> int:
        return 2**self.power

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n // ROW, ROW) if self.reduction == "rows" else (self.n,)

    @property
    def bytes_moved(self) -> int:
        """The minimum that a call moves: every operand read once, every result written once."""
        width = ITEMSIZE[self.logits] + ITEMSIZE[self.labels]
        width += ITEMSIZE[self.logits] * (self.mode == "value_and_grad")
        width += ITEMSIZE[self.logits] * (self.reduction == "none")
        width += ITEMSIZE["float32"] * (self.reduction == "weighted")
        return self.n * width

    @property
    def calls(self) -> int:
        """Calls per program: enough to move ROTATED_BYTES, at most MOST_CALLS."""
        return min(math.ceil(ROTATED_BYTES / self.bytes_moved), MOST_CALLS)


class Program(NamedTuple):
    """`enqueue` starts a replay of all calls; `wait` returns when the last one is done."""

    enqueue: Callable[[], object]
    wait: Callable[[], object]
    is_graph: bool


Builders = dict[str, Callable[[], Program]]
