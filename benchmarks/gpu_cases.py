"""What gpu.py measures, without JAX and PyTorch: each of them has a process of its own.

A contestant becomes a program that holds many calls of it and is replayed. Every call of a program
reads operands of its own and leaves its results in buffers of its own, so that none finds in the L2
cache what it needs; the calls run one after the other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
# Four times the largest L2 cache there is (126 MB, B200).
ROTATED_BYTES = 2**29
MOST_CALLS = 64
GATE_WORDS = {"cpu": 2**20, "gpu": 2**30}
ROW = 1024


class Case(NamedTuple):
    """What is computed: `reduction` is "mean", "rows" (axis=-1), "none", or "weighted".

    "weighted" is a mean of weighted losses that the user reduces: XLA may fuse what is around them.
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
        """The least that a call can move: every operand read once, every result written once."""
        width = ITEMSIZE[self.logits] + ITEMSIZE[self.labels]
        width += ITEMSIZE[self.logits] * (self.mode == "value_and_grad")
        width += ITEMSIZE[self.logits] * (self.reduction == "none")
        width += ITEMSIZE["float32"] * (self.reduction == "weighted")
        return self.n * width

    @property
    def calls(self) -> int:
        """In a program: what they move is ROTATED_BYTES, or as much as MOST_CALLS do."""
        return min(math.ceil(ROTATED_BYTES / self.bytes_moved), MOST_CALLS)


class Program(NamedTuple):
    """`enqueue` starts a replay of all the calls, `wait` ends with the last one."""

    enqueue: Callable[[], object]
    wait: Callable[[], object]
    is_graph: bool


Builders = dict[str, Callable[[], Program]]
