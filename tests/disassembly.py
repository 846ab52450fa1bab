"""What the compiler made of the CUDA kernels: the built module's disassembly, as Markdown tables.

    python tests/disassembly.py                       # of 90
    python tests/disassembly.py --architecture 120

Needs no GPU, but cuobjdump and nvdisasm: of a CUDA toolkit, of the packages nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm (they are in the extra `test`), or of Triton.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jax_bce import _kernels

# The templates' arguments, as a symbol holds them: the dtypes of logits and labels ("S2_" is the
# logits' own), and whether there are modifiers.
LOGITS = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}
LABELS = {"h": "uint8", "f": "float32", "S2_": "bfloat16", "NS0_3AnyE": "any"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SYMBOL = re.compile(
    rf"\d(evaluate|finish_rows)I({'|'.join(LOGITS)})(?:({'|'.join(LABELS)})Lb([01]))?E"
)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)")

LISTED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
BRANCH = re.compile(r"(@\S+ )?BRA\S*(.*) 0x([0-9a-f]+)")
ACCESS = re.compile(r"(@\S+ )?(LDG|STG)\.E(?:\.[A-Z]\w*)*?(?:\.[US]?(\d+))?(?:\.[A-Z]+)* ")
RECIPROCAL = re.compile(r"(@\S+ )?MUFU")


def find_cuobjdump() -> str | None:
    """The program's path, or None."""
    places = [None]  # the PATH
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        if spec := importlib.util.find_spec(package):
            places += [Path(place, folder) for place in spec.submodule_search_locations or ()]
    return next(filter(None, (shutil.which("cuobjdump", path=place) for place in places)), None)


def missing() -> str | None:
    """Why nothing can be disassembled; None if it can."""
    if _kernels._cuda is None:
        return _kernels.missing("cuda")
    return None if find_cuobjdump() else "there is no cuobjdump: pip install nvidia-cuda-cuobjdump"


def cuobjdump(*options: str) -> str:
    command = [find_cuobjdump(), *options, _kernels._cuda.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(kind: str) -> list[int]:
    """Those that the module holds machine code for ("elf"), or code to compile later ("ptx")."""
    return sorted(
        {int(number) for number in re.findall(r"\.sm_(\d+)\.", cuobjdump(f"--list-{kind}"))}
    )


@dataclass
class Instruction:
    text: str
    followers: list[int]  # what may come next: places in the kernel's list of instructions

    @property
    def is_conditional(self) -> bool:
        return self.text.startswith("@")

    def width(self, operation: str) -> int:
        """How many bits a thread loads ("LDG") or stores ("STG") with it."""
        access = ACCESS.match(self.text)
        return int(access[3] or 32) if access and access[2] == operation else 0


def parse(disassembly: str) -> list[Instruction]:
    listed = LISTED.findall(disassembly)
    places = {int(address, 16): place for place, (address, _) in enumerate(listed)}
    code = []
    for place, (_, text) in enumerate(listed):
        branch = BRANCH.match(text)
        followers = [places[int(branch[3], 16)]] if branch else []
        ends = text.startswith(("EXIT", "RET", "BRX", "JMX"))
        if not ends and not (branch and not branch[1] and not branch[2].strip()):
            followers.append(place + 1)
        code.append(Instruction(text, followers))
    return code


@dataclass(frozen=True)
class Turn:
    """What a thread does in one turn of a loop, by which its way through the code is found."""

    loads: dict[int, int]  # how many of each width in bits
    stores: tuple[int, int]  # width, and how many
    approximations: int  # reciprocals and exponentials
    votes: int = 1  # how often the warp decides which way to take
    without: str = "STS"  # instructions of other ways: here, of tiles


def way(code: list[Instruction], turn: Turn) -> list[Instruction]:
    """The shortest way from a vote back to it that does the turn's work; or nothing.

    Predicated instructions count, as they are issued even if their condition is false.
    """
    without = re.compile(turn.without)
    loaded = sum(width * count for width, count in turn.loads.items())
    goal = (loaded, turn.stores[0] * turn.stores[1], turn.approximations, turn.votes)
    best: list[int] = []
    for start, vote in enumerate(code):
        if "VOTE.ANY" not in vote.text:
            continue
        first = (start, 0, 0, 0, 1)
        before: dict = {first: None}
        queue = deque([first])
        end = None
        while queue and end is None:
            state = queue.popleft()
            for place in code[state[0]].followers:
                if place == start and state[1:] == goal:
                    end = state
                    break
                if place >= len(code) or place == start:
                    continue
                step = code[place]
                load, store = step.width("LDG"), step.width("STG")
                if without.search(step.text) or (load and load not in turn.loads):
                    continue
                if store and store != turn.stores[0] and not step.is_conditional:
                    continue
                # A store under a condition is not always asked for.
                for stored in {store, 0} if step.is_conditional else {store}:
                    done = (
                        state[1] + load,
                        state[2] + stored,
                        state[3] + bool(RECIPROCAL.match(step.text)),
                        state[4] + ("VOTE.ANY" in step.text),
                    )
                    following = (place, *done)
                    fits = all(a <= b for a, b in zip(done, goal, strict=True))
                    if fits and following not in before:
                        before[following] = state
                        queue.append(following)
        found = []
        while end is not None:
            found.append(end[0])
            end = before[end]
        if found and (not best or len(found) < len(best)):
            best = found[::-1]
    return [code[place] for place in best]


# The loops worth counting: name, dtypes of logits and labels, whether there are modifiers, and the
# number of elements and the work of a turn.
LOOPS = {
    "float32": ("float32", "float32", False, 8, Turn({128: 4}, (128, 2), 16)),
    "float32, uint8": ("float32", "uint8", False, 8, Turn({128: 2, 32: 2}, (128, 2), 16)),
    "float32, short rows": (
        *("float32", "float32", False, 8),
        Turn({128: 4}, (128, 2), 16, without="DADD"),
    ),
    "float32, soft or smoothed": (
        *("float32", "float32", False, 8),
        Turn({128: 4}, (128, 2), 16, votes=2),
    ),
    "float32, a weight per class": (
        *("float32", "any", True, 4),
        Turn({128: 3}, (128, 1), 8),
    ),
    "bfloat16, uint8": ("bfloat16", "uint8", False, 16, Turn({64: 4, 32: 4}, (64, 4), 49)),
    "bfloat16": ("bfloat16", "bfloat16", False, 8, Turn({64: 4}, (64, 2), 25)),
    "float16, uint8": ("float16", "uint8", False, 16, Turn({64: 4, 32: 4}, (64, 4), 49)),
}


@dataclass
class Kernel:
    architecture: int
    symbol: str
    registers: int
    stack: int  # bytes of a thread, for what did not fit into registers

    def __post_init__(self) -> None:
        self.name, logits, labels, modified = SYMBOL.search(self.symbol).groups()
        self.logits, self.labels = LOGITS[logits], LABELS.get(labels, "")
        self.modified = modified == "1"

    @cached_property
    def code(self) -> list[Instruction]:
        return parse(cuobjdump("-sass", "-arch", f"sm_{self.architecture}", "-fun", self.symbol))

    @property
    def warps(self) -> int:
        """How many a multiprocessor with 65536 registers holds, in blocks of four."""
        return 4 * (65536 // (128 * ((self.registers + 7) // 8 * 8)))


@dataclass
class Loop:
    name: str
    kernel: Kernel
    instructions: float  # for an element
    loads: list[int]  # widths in bits
    stores: list[int]

    @property
    def bytes_in_flight(self) -> int:
        """What all threads of a multiprocessor load while they evaluate."""
        return self.kernel.warps * 32 * sum(self.loads) // 8


def kernels(architecture: int) -> list[Kernel]:
    usage = USAGE.findall(cuobjdump("-res-usage", "-arch", f"sm_{architecture}"))
    return [
        Kernel(architecture, symbol, int(registers), int(stack) + int(local))
        for symbol, registers, stack, local in usage
    ]


@cache
def loop(architecture: int, name: str) -> Loop:
    logits, labels, modified, elements, turn = LOOPS[name]
    wanted = ("evaluate", logits, labels, modified)
    (kernel,) = (
        k for k in kernels(architecture) if (k.name, k.logits, k.labels, k.modified) == wanted
    )
    found = way(kernel.code, turn)
    assert found, f"no such way through {kernel}: {name}"
    widths = {
        operation: [width for i in found if (width := i.width(operation))]
        for operation in ("LDG", "STG")
    }
    return Loop(name, kernel, len(found) / elements, widths["LDG"], widths["STG"])


def markdown(*rows: list) -> str:
    heading, *rest = rows
    lines = [heading, ["---"] * len(heading), *rest]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def table_of_loops(architecture: int) -> str:
    heading = ["", "loop", "instructions per element", "loads", "warps", "bytes in flight"]
    loops = [loop(architecture, name) for name in LOOPS]
    return markdown(
        heading,
        *(
            [
                *(architecture, each.name, f"{each.instructions:.1f}"),
                ", ".join(map(str, each.loads)),
                *(each.kernel.warps, each.bytes_in_flight),
            ]
            for each in loops
        ),
    )


def table(rows: list[Kernel]) -> str:
    heading = ["", "kernel", "logits", "labels", "modifiers", "registers", "stack"]
    return markdown(
        heading,
        *(
            [
                *(k.architecture, k.name, k.logits, k.labels),
                *("yes" if k.modified else "", k.registers, k.stack),
            ]
            for k in rows
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", type=int, help="instead of 90")
    asked = parser.parse_args().architecture
    if reason := missing():
        sys.exit(reason)
    if not asked:
        print(f"Machine code for {', '.join(map(str, architectures('elf')))}; ", end="")
        print(f"PTX of {', '.join(map(str, architectures('ptx')))}.\n")
    order = list(BYTES)
    found = kernels(asked or 90)
    print(table_of_loops(asked or 90) + "\n")
    print(table(sorted(found, key=lambda k: (k.name, order.index(k.logits), k.labels))))


if __name__ == "__main__":
    main()
