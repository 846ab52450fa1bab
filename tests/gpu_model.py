"""How long XLA's kernels and this package's would take on GPUs that are not here: a model.

    python tests/gpu_model.py                 # H100 and H200
    python tests/gpu_model.py --gpus A100 L4 --cases "mean" "label_smoothing"

Nothing runs: these are models, not measurements. XLA compiles what a user writes in plain jnp, and
`implementation="cuda"`, for an H200. Of each kernel, the bytes that it moves are read off the HLO,
and the instructions off its machine code. A kernel takes as long as the slowest of five: memory at
the speed of a copy, the instructions at one per clock and scheduler, those of one thread at one per
clock, the special functions, and float64. Each launch adds 2.2 us. Caches, latency, the last wave
and what GPUs send to each other are left out, for both sides.

Needs what `gpu_compiler.py` and `disassembly.py` need, and ptxas.
"""

import argparse
import atexit
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"--xla_dump_to={tempfile.mkdtemp(prefix='xla-')}"  # read at the start

import disassembly
import gpu_compiler
import jax
import jax.numpy as jnp
from hlo import bytes_moved, kernel_bytes
from jax.sharding import NamedSharding, PartitionSpec

import jax_bce

DUMP = Path(os.environ["XLA_FLAGS"].partition("=")[2])
atexit.register(shutil.rmtree, DUMP)

LAUNCH = 2.2e-6  # seconds from the start of one kernel to the start of the next, if both are empty


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets; `copy` is what a copy of a large array reaches."""

    copy: float  # bytes per second, read and written
    processors: int
    clock: float  # Hz, boost
    float64: int  # operations per clock and processor
    cluster: int = 16  # thread blocks, of four groups each, that can wait for each other
    special: int = 16  # reciprocals, exponentials and conversions, per clock and processor


GPUS = {
    "H100": Gpu(3.0e12, 132, 1.98e9, 64),
    "H200": Gpu(4.3e12, 132, 1.98e9, 64),
    "A100": Gpu(1.78e12, 108, 1.41e9, 32, cluster=1),
    "B200": Gpu(7.2e12, 148, 1.92e9, 64),
    "B300": Gpu(7.2e12, 160, 1.92e9, 2),
    "RTX 4090": Gpu(0.93e12, 128, 2.52e9, 2, cluster=1),
    "L4": Gpu(0.27e12, 58, 2.04e9, 2, cluster=1),
}


@dataclass
class Work:
    """What one kernel does, over all its threads."""

    name: str
    bytes: int
    instructions: float = 0
    float64: float = 0
    special: float = 0
    longest: float = 0  # the instructions of one thread

    def seconds(self, gpu: Gpu) -> float:
        a_second = gpu.processors * gpu.clock
        return max(
            self.bytes / gpu.copy,
            self.instructions / (128 * a_second),
            self.longest / gpu.clock,
            self.float64 / (gpu.float64 * a_second),
            self.special / (gpu.special * a_second),
        )


SPECIAL = re.compile(r"(@\S+ )?(MUFU|F2F|I2F|F2I)")
FLOAT64 = re.compile(r"(@\S+ )?D(ADD|MUL|FMA)")


def counted(code: list[disassembly.Instruction], read: float, written: float) -> dict[str, float]:
    """What one thread executes that reads and writes so many bytes.

    The turns of a loop follow from what it stores; if it stores nothing, from what it loads.
    """
    ends = [place for place, each in enumerate(code) if each.text == "EXIT"]
    code = code[: ends[-1] + 1]
    times = [1.0] * len(code)
    # XLA's kernels have no branches but the ends of loops, which are not nested.
    ends = [(min(step.followers, default=last), last) for last, step in enumerate(code)]
    for first, last in (each for each in ends if each[0] < each[1]):
        loop = code[first : last + 1]
        loaded, stored = (sum(each.width(what) for each in loop) / 8 for what in ("LDG", "STG"))
        turns = written / stored if stored else read / loaded if loaded else 1.0
        times[first : last + 1] = [max(1.0, turns)] * len(loop)
    return tally([(t, each.text) for t, each in zip(times, code, strict=True)])


def tally(executed: list[tuple[float, str]]) -> dict[str, float]:
    """How many instructions, and of two kinds, from how often each is executed."""
    executed = [(t, text) for t, text in executed if text != "NOP"]
    return {
        "instructions": sum(t for t, _ in executed),
        "float64": sum(t for t, text in executed if FLOAT64.match(text)),
        "special": sum(t for t, text in executed if SPECIAL.match(text)),
    }


def machine_code() -> dict[str, list[disassembly.Instruction]]:
    """Of each kernel in XLA's dump, assembled for an H100."""
    code = {}
    for ptx in DUMP.glob("*.ptx"):
        if ptx.stat().st_size:
            cubin = ptx.with_suffix(".cubin")
            command = [shutil.which("ptxas"), "-arch", "sm_90a", ptx, "-o", cubin]
            subprocess.run(command, check=True)
            listing = [disassembly.find_cuobjdump(), "-sass", cubin]
            text = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
            for part in text.split("Function : ")[1:]:
                code[part.split("\n")[0].strip()] = disassembly.parse(part)
    return code


THUNK = re.compile(r"\] (\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]")


def by_xla(function: Callable, operands: list[jax.ShapeDtypeStruct]) -> list[Work]:
    """XLA's kernels for a function, in their order."""
    for path in DUMP.iterdir():
        path.unlink()
    compiled = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()
    moved = {name.replace(".", "_"): sizes for name, sizes in kernel_bytes(compiled).items()}
    code = machine_code()
    (sequence,) = (path.read_text() for path in DUMP.glob("*thunk_sequence.txt"))
    found = []
    thunks = [line for line in re.findall(r"^\d+:.*", sequence, re.M) if "AllReduce" not in line]
    for name, *sizes in THUNK.findall(sequence):
        threads = math.prod(int(size) for text in sizes for size in text.split(","))
        read, written = moved[name]
        each = counted(code[name], read / threads, written / threads)
        work = Work(name, read + written, **{what: n * threads for what, n in each.items()})
        found.append(replace(work, longest=each["instructions"]))
    assert len(found) == len(thunks), sequence
    return found


F32, BF16, F16, U8 = jnp.float32, jnp.bfloat16, jnp.float16, jnp.uint8


def jnp_elements(x, y, label_smoothing=0.0, pos_weight=1.0):
    """What a user writes, in float32."""
    x, y = x.astype(F32), jnp.asarray(y, F32) * (1 - label_smoothing) + label_smoothing / 2
    tail = jnp.log1p(jnp.exp(-jnp.abs(x)))
    return (1 - y) * x + (1 + (pos_weight - 1) * y) * (tail + jnp.maximum(-x, 0))


def jnp_loss(x, y, *, weight=1.0, sample_weight=None, where=None, ignore_label=None, **more):
    """The same with the options of `jax_bce.loss`, as they are written without it."""
    losses = jnp_elements(x, y, **more) * weight
    if sample_weight is not None:
        losses = losses * sample_weight[:, None]
    if ignore_label is not None:
        where = y != ignore_label
    if where is None:
        return jnp.mean(losses)
    return jnp.sum(jnp.where(where, losses, 0)) / jnp.sum(where)


@dataclass(frozen=True)
class Case:
    """A row of the table. `operands` are the logits, the labels, and arrays for `names`."""

    loop: str  # of disassembly.LOOPS: the kernel's, or one that is not shorter
    operands: tuple[tuple[tuple[int, ...], Any], ...]
    names: tuple[str, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)
    rows: bool = False  # a mean of each row, not one of everything
    gradient: bool = True
    padded: float = 0.0  # the share of turns with a logit far from 0
    gpus: int = 1  # over which the rows are spread; bytes and elements are those of one

    def function(self, loss: Callable) -> Callable:
        def of(x, y, *arrays):
            return loss(x, y, **self.fixed, **dict(zip(self.names, arrays, strict=True)))

        function = jax.value_and_grad(of) if self.gradient else of
        return jax.vmap(function) if self.rows else function

    @property
    def elements(self) -> int:
        return math.prod(self.operands[0][0]) // self.gpus

    @property
    def placed(self) -> list[jax.ShapeDtypeStruct]:
        gpus, rows = gpu_compiler.mesh(f"1x1x{self.gpus}"), self.operands[0][0][0]
        return [
            jax.ShapeDtypeStruct(
                shape,
                dtype,
                sharding=NamedSharding(gpus, PartitionSpec(*["gpu"] * (shape[:1] == (rows,)))),
            )
            for shape, dtype in self.operands
        ]

    def launches(self, gpu: Gpu) -> int:
        """Those of a call. Rows of up to 1,024 elements take one, and so do four groups of 1,024
        for each thread block of a cluster, and the sums that XLA adds up on several GPUs."""
        length = self.operands[0][0][-1] if self.rows else self.elements
        groups = self.elements // length * -(-length // 1024)
        return 1 if length <= 1024 or groups <= 4 * gpu.cluster or self.gpus > 1 else 2


def by_kernel(case: Case) -> list[Work]:
    """What the package's kernel does for a case, and the launches that XLA adds."""
    function = jax.jit(case.function(partial(jax_bce.loss, implementation="cuda")))
    compiled = function.trace(*case.placed).lower(lowering_platforms=("cuda",)).compile()
    executed = []
    loops = {case.loop: 1 - case.padded, "float32, a turn with padding": case.padded}
    for loop, share in ((disassembly.loop(90, name), share) for name, share in loops.items()):
        turns = share * case.elements / loop.elements
        executed += [(turns, step.text) for step in loop.code]
    ours = Work("ours", bytes_moved(compiled), **tally(executed))
    # A warp evaluates a group of 1,024 elements, or as many of a tile.
    ours.longest = ours.instructions / case.elements * min(32, case.elements)
    return [ours] + [Work("launch", 0)] * (len(kernel_bytes(compiled)) - 1)


def pair(*shape: int, logits: Any = F32, labels: Any = F32) -> tuple:
    return (shape, logits), (shape, labels)


LARGE = 4096, 8192
SMALL = pair(*LARGE, logits=BF16, labels=U8)
CASES = {
    "mean": Case("float32", pair(*LARGE)),
    "mean, one logit of 1,024 beyond 44": Case("float32", pair(*LARGE), padded=0.25),
    "mean, bfloat16 and uint8": Case("bfloat16, uint8", SMALL),
    "mean, float16 and uint8": Case("float16, uint8", pair(*LARGE, logits=F16, labels=U8)),
    "loss alone": Case("float32, loss alone", pair(*LARGE), gradient=False),
    "loss alone, bfloat16 and uint8": Case("bfloat16, uint8, loss alone", SMALL, gradient=False),
    "mean of 32,768 x 1,000 on 8 GPUs": Case("float32", pair(32_768, 1_000), gpus=8),
    "mean of 32,768 x 1,000 on 8 GPUs, bfloat16 and uint8": Case(
        "bfloat16, uint8", pair(32_768, 1_000, logits=BF16, labels=U8), gpus=8
    ),
    **{f"mean of 2^{n}": Case("float32", pair(2**n)) for n in (10, 12, 14, 16, 17, 20)},
    **{
        f"rows, {rows:,} x {columns:,}": Case(loop, pair(rows, columns), rows=True)
        for rows, columns, loop in (
            (5_000_000, 2, "float32, short rows"),
            (1_000_000, 10, "float32, short rows"),
            (125_000, 80, "float32, short rows"),
            (131_072, 256, "float32, short rows"),
            (33_520, 1_001, "float32, short rows"),
            (30_000, 1_100, "float32"),
            (6_710, 5_000, "float32"),
        )
    },
    "soft labels": Case("float32, soft or smoothed", pair(*LARGE)),
    "label_smoothing": Case(
        "float32, soft or smoothed", pair(*LARGE), fixed={"label_smoothing": 0.1}
    ),
    "one label for all": Case("float32, one label", ((LARGE, F32), ((), F32))),
    "weight (C,)": Case(
        "float32, a weight per class", (*pair(*LARGE), (LARGE[1:], F32)), ("weight",)
    ),
    "weight (C,), soft labels": Case(
        "float32, a weight per class, soft labels", (*pair(*LARGE), (LARGE[1:], F32)), ("weight",)
    ),
    "weight (C,), bfloat16 and uint8": Case(
        "bfloat16, uint8, a weight per class", (*SMALL, (LARGE[1:], F32)), ("weight",)
    ),
    "pos_weight (C,)": Case(
        "float32, pos_weight per class", (*pair(*LARGE), (LARGE[1:], F32)), ("pos_weight",)
    ),
    "weight and pos_weight (C,), sample_weight (B,)": Case(
        "float32, weight, pos_weight and sample_weight",
        (*pair(*LARGE), (LARGE[1:], F32), (LARGE[1:], F32), (LARGE[:1], F32)),
        ("weight", "pos_weight", "sample_weight"),
    ),
    "weight (B, C)": Case(
        "float32, a weight per class", (*pair(*LARGE), (LARGE, F32)), ("weight",)
    ),
    "where (B, C)": Case("float32, where", (*pair(*LARGE), (LARGE, jnp.bool_)), ("where",)),
    "ignore_label, int32": Case(
        "float32, int32, ignore_label", pair(*LARGE, labels=jnp.int32), fixed={"ignore_label": -1}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=["H100", "H200"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    gpus = options.gpus
    if reason := gpu_compiler.missing() or disassembly.missing():
        sys.exit(reason)
    gpu_compiler.prepare()
    heading = ["value_and_grad", "kernels", "bytes per element", "instructions per element"]
    heading += [f"{gpu}, us: XLA, jax_bce" for gpu in gpus]
    print(f"| {' | '.join(heading)} |\n| --- |{' --: |' * (len(heading) - 1)}")
    for name in options.cases:
        case = CASES[name]
        both = by_xla(case.function(jnp_loss), case.placed), by_kernel(case)
        more = {gpu: case.launches(GPUS[gpu]) - 1 for gpu in gpus}
        cells = [f"{len(both[0])}, {len(both[1]) + more[gpus[0]]}"]
        for what in ("bytes", "instructions"):
            sums = [sum(getattr(work, what) for work in works) for works in both]
            cells.append(", ".join(f"{number / case.elements:.1f}" for number in sums))
        for gpu in gpus:
            theirs, own = (
                sum(work.seconds(GPUS[gpu]) + LAUNCH for work in works) for works in both
            )
            own += LAUNCH * more[gpu]
            cells.append(f"{theirs * 1e6:.1f}, {own * 1e6:.1f} ({theirs / own:.2f}x)")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
