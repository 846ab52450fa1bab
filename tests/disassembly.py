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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from heapq import heapify, heappop, heappush
from itertools import product
from math import inf
from pathlib import Path

from jax_bce import _kernels

# The templates' arguments, as a symbol holds them: the dtypes of logits and labels ("S2_" is the
# logits' own: bfloat16, or any), and the kind.
KINDS_OF_LOSS = ["", "modifiers or focal"]
LOGITS = {
    "6__half": "float16",
    "13__nv_bfloat16": "bfloat16",
    "t": "any of 16 bits",
    "f": "float32",
    "NS0_3AnyE": "any but float64",
    "d": "float64",
}
LABELS = {"h": "uint8", "f": "float32", "NS0_3AnyE": "any", "S2_": "any"}
SYMBOL = re.compile(
    rf"\d(evaluate|finish_rows)I({'|'.join(LOGITS)})(?:({'|'.join(LABELS)})Lb([01])E)?E"
)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)")

LISTED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
BRANCH = re.compile(r"(@\S+ )?BRA\S*(.*) 0x([0-9a-f]+)")
ACCESS = re.compile(r"(@\S+ )?(LDG|STG)\.E(?:\.[A-Z]\w*)*?(?:\.[US]?(\d+))?(?:\.[A-Z]+)* ")
KINDS = [re.compile(rf"(@\S+ )?{name}") for name in ("MUFU", r"VOTE\.ANY", "DADD", "STS")]


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

    @property
    def kinds(self) -> list[bool]:
        """Whether it is an approximation, a vote, an addition in float64, a store to a tile."""
        return [bool(kind.match(self.text)) for kind in KINDS]

    @property
    def is_vote(self) -> bool:
        return self.kinds[1]

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
        leaves = ends or (branch and not branch[1] and not branch[2].strip())
        if not leaves and place + 1 < len(listed):
            followers.append(place + 1)
        code.append(Instruction(text, followers))
    return code


Work = tuple[int, ...]  # the kinds, stores, and loads of each width


def add(a: Work, b: Work) -> Work:
    return tuple(x + y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Turn:
    """What a thread does in one turn of a loop, by which its way through the code is found."""

    loads: dict[int, int]  # how many of each width in bits
    stores: tuple[int, int]  # width, and how many
    approximations: int  # reciprocals and exponentials
    additions: int = 0  # in float64, to a sum
    shared: int = 0  # stores of losses to shared memory, where a tile's rows are summed
    least: dict[str, int] = field(default_factory=dict)  # how many of other instructions, or more
    loop: int = 0  # of the loops that do this work, from the shortest on
    votes: int = 1  # more: in the loop around those of common turns

    @property
    def work(self) -> Work:
        counts = (self.approximations, self.votes, self.additions, self.shared, self.stores[1])
        return (*counts, *self.loads.values(), *self.least.values())

    def work_of(self, step: Instruction) -> list[Work]:
        """What an instruction may do of this work; an empty list if no turn contains it."""
        others = [bool(re.match(rf"(@\S+ )?{name}", step.text)) for name in self.least]
        # A load or store under a condition is not always asked for.
        loads, stores = (
            {step.width(what), 0} if step.is_conditional else {step.width(what)}
            for what in ("LDG", "STG")
        )
        return [
            (*step.kinds, store != 0, *(load == width for width in self.loads), *others)
            for load, store in product(loads & {0, *self.loads}, stores & {0, self.stores[0]})
        ]


@dataclass
class Block:
    """Instructions without a branch between them, up to the next branch or vote."""

    places: list[int]
    followers: list[int]
    work: set[Work]  # what all of them together may do; empty if no turn contains them


def loops_of(code: list[Instruction], outer: bool = False) -> dict[int, set[int]]:
    """The places of each loop's instructions, by that of its only vote.

    If `outer`, those of the smallest loop with several votes, by that of its last one.
    """
    before = defaultdict(list)
    for place, step in enumerate(code):
        for follower in step.followers:
            before[follower].append(place)
    loops: dict[int, set[int]] = {}
    for last, step in enumerate(code):
        for first in (place for place in step.followers if place <= last):
            body, ends = {first}, [last]
            while ends:
                if (place := ends.pop()) not in body:
                    body.add(place)
                    ends += before[place]
            # But for copies of votes, out of line, for warps whose threads have diverged.
            out_of_line = {place for place in body if code[place].text.startswith("WARPSYNC")}
            body -= out_of_line
            votes = sorted(p for p in body if code[p].is_vote and p - 1 not in out_of_line)
            if (len(votes) > 1) == outer and votes and len(body) < len(loops.get(votes[-1], code)):
                loops[votes[-1]] = body
    return dict(sorted(loops.items())[-1:]) if outer else loops


def blocks_from(
    vote: int, code: list[Instruction], inside: set[int], turn: Turn
) -> dict[int, Block]:
    """Those of a loop, by the place of their first instruction."""
    blocks: dict[int, Block] = {}
    firsts = [vote]
    while firsts:
        first = firsts.pop()
        if first in blocks:
            continue
        places, followers, work = [], [first], {(0,) * len(turn.work)}
        while len(followers) == 1 and followers[0] not in {*places, *({vote} if places else ())}:
            step = code[followers[0]]
            places += followers
            followers = [place for place in step.followers if place in inside]
            work = {add(*each) for each in product(work, turn.work_of(step))}
        blocks[first] = Block(places, followers if work else [], work)
        firsts += blocks[first].followers
    return blocks


def shortest_first(starts: list, steps: Callable, at_least: Callable = lambda state: 0) -> Iterator:
    """The A* search: each state that can be reached, the shortest way's length, and its states.

    `steps(state)` yields the next states and how long the step to each is; `at_least(state)` is a
    lower bound of the length that is left. Without a bound, this is Dijkstra's algorithm.
    """
    queue = [(at_least(state), state, 0, ()) for state in starts]
    heapify(queue)
    seen = set()
    while queue:
        _, state, length, states = heappop(queue)
        if state in seen:
            continue
        seen.add(state)
        yield state, length, states
        for following, more in steps(state):
            if following not in seen and (left := at_least(following)) < inf:
                total = length + more
                heappush(queue, (total + left, following, total, (*states, state)))


def way(code: list[Instruction], turn: Turn) -> list[Instruction]:
    """The shortest way from a loop's vote back to it that does the turn's work; or nothing.

    Predicated instructions count, as they are issued even if their condition is false.
    """
    ways = (
        way_in(vote, inside, code, turn)
        for vote, inside in loops_of(code, turn.votes > 1).items()
        # These loops approximate nothing in vain, but may have several ways for a turn.
        if sum(code[place].kinds[0] for place in inside) >= turn.approximations
    )
    found = sorted(filter(None, ways), key=len)
    return found[turn.loop] if turn.loop < len(found) else []


def way_in(vote: int, inside: set[int], code: list[Instruction], turn: Turn) -> list[Instruction]:
    """The same in one loop."""
    blocks = blocks_from(vote, code, inside, turn)
    nothing = (0,) * len(turn.work)
    exact = len(nothing) - len(turn.least)
    leaders = defaultdict(list)
    for first, block in blocks.items():
        for follower in block.followers:
            leaders[follower].append((first, len(block.places), min(block.work)[0]))

    def backwards(state: tuple[int, int]) -> Iterator:
        place, approximations = state
        if place != vote or not approximations:
            for first, length, more in leaders[place]:
                if approximations + more <= turn.approximations:
                    yield (first, approximations + more), length

    def forwards(state: tuple[int, Work]) -> Iterator:
        place, done = state
        if place != vote or done == nothing:
            for work, follower in product(blocks[place].work, blocks[place].followers):
                after = add(done, work)
                after = (*after[:exact], *map(min, after[exact:], turn.least.values()))
                if all(a <= b for a, b in zip(after, turn.work, strict=True)):
                    yield (follower, after), len(blocks[place].places)

    # The shortest way back with a number of approximations, whatever else it does, is a lower bound
    # with which the search for all of the work visits few states.
    back = {state: length for state, length, _ in shortest_first([(vote, 0)], backwards)}

    def at_least(state: tuple[int, Work]) -> float:
        place, done = state
        return back.get((place, turn.approximations - done[0]), inf)

    for (place, done), _, states in shortest_first([(vote, nothing)], forwards, at_least):
        if place == vote and done == turn.work:
            return [code[each] for first, _ in states for each in blocks[first].places]
    return []


# The loops worth counting: name, dtypes of logits and labels, the kind, and the
# number of elements and the work of a turn. Of modifiers, the selections and products name the way,
# as its conditions do not.
LOOPS = {
    "float32": ("float32", "float32", "", 8, Turn({128: 4}, (128, 2), 16, 8)),
    "float32, uint8": ("float32", "uint8", "", 8, Turn({128: 2, 32: 2}, (128, 2), 16, 8)),
    "float32, short rows": (
        *("float32", "float32", "", 8),
        Turn({128: 4}, (128, 2), 16, shared=4),
    ),
    "float32, soft or smoothed": (
        *("float32", "float32", "", 8),
        Turn({128: 4}, (128, 2), 16, 8, loop=2),
    ),
    "float32, a turn with padding": (
        *("float32", "float32", "", 8),
        Turn({128: 8}, (128, 2), 16, 8, least={"FMUL": 120}, votes=4),
    ),
    "float32, one label": (
        *("float32", "float32", "", 8),
        Turn({128: 2}, (128, 2), 16, 8),
    ),
    "float32, loss alone": (
        *("float32", "float32", "", 8),
        Turn({128: 4}, (0, 0), 8, 8),
    ),
    "float32, a weight per class": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 6}, (128, 2), 16, 8, least={"FFMA": 216}),
    ),
    "float32, pos_weight per class": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 6}, (128, 2), 16, 8, least={"FFMA": 216, "FSEL": 16}),
    ),
    "float32, weight, pos_weight and sample_weight": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 8, 32: 2}, (128, 2), 16, 8, least={"FFMA": 240, "LDG.E.EF.128": 4}),
    ),
    "float32, where": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 4, 32: 2}, (128, 2), 16, 8, least={"FSEL": 48}),
    ),
    "float32, int32, ignore_label": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 4}, (128, 2), 16, 8, least={"FSEL": 48}),
    ),
    "float32, a weight per class, soft labels": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 6}, (128, 2), 16, 8, least={"FFMA": 232, "LDG.E.EF.128": 4}),
    ),
    "float32, pos_weight per class, soft labels": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 6}, (128, 2), 16, 8, least={"FFMA": 320, "LDG.E.EF.128": 4}),
    ),
    "bfloat16, uint8, a weight per class": (
        *("any but float64", "any", "modifiers or focal", 8),
        Turn({128: 2, 64: 2, 32: 2}, (64, 2), 16, 8, least={"FFMA": 224}),
    ),
    "bfloat16, uint8": ("bfloat16", "uint8", "", 16, Turn({64: 4, 32: 4}, (64, 4), 48, 1)),
    "bfloat16, uint8, loss alone": (
        *("bfloat16", "uint8", "", 16),
        Turn({64: 4, 32: 4}, (0, 0), 32, 1),
    ),
    "bfloat16": ("bfloat16", "bfloat16", "", 8, Turn({64: 4}, (64, 2), 24, 1)),
    "float16, uint8": ("float16", "uint8", "", 16, Turn({64: 4, 32: 4}, (64, 4), 48, 1)),
}


@dataclass
class Kernel:
    architecture: int
    symbol: str
    registers: int
    stack: int  # bytes of a thread, for what did not fit into registers

    def __post_init__(self) -> None:
        self.name, logits, labels, kind = SYMBOL.search(self.symbol).groups()
        self.logits, self.labels = LOGITS[logits], LABELS.get(labels, "")
        if labels == "S2_" and self.logits == "bfloat16":
            self.labels = self.logits
        self.kind = KINDS_OF_LOSS[int(kind or 0)]

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
    elements: int
    code: list[Instruction]  # of a turn, for so many elements

    @property
    def instructions(self) -> float:
        """For an element."""
        return len(self.code) / self.elements

    @property
    def loads(self) -> list[int]:
        """Their widths in bits."""
        return [width for step in self.code if (width := step.width("LDG"))]

    @property
    def bytes_in_flight(self) -> int:
        """What all threads of a multiprocessor load while they evaluate."""
        return self.kernel.warps * 32 * sum(self.loads) // 8


@cache
def kernels(architecture: int) -> list[Kernel]:
    usage = USAGE.findall(cuobjdump("-res-usage", "-arch", f"sm_{architecture}"))
    return [
        Kernel(architecture, symbol, int(registers), int(stack) + int(local))
        for symbol, registers, stack, local in usage
    ]


@cache
def loop(architecture: int, name: str) -> Loop:
    logits, labels, kind, elements, turn = LOOPS[name]
    wanted = ("evaluate", logits, labels, kind)
    (kernel,) = (k for k in kernels(architecture) if (k.name, k.logits, k.labels, k.kind) == wanted)
    found = way(kernel.code, turn)
    assert found, f"no such way through {kernel}: {name}"
    return Loop(name, kernel, elements, found)


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
    heading = ["", "kernel", "logits", "labels", "kind", "registers", "stack"]
    return markdown(
        heading,
        *(
            [
                *(k.architecture, k.name, k.logits, k.labels),
                *(k.kind, k.registers, k.stack),
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
    order = list(LOGITS.values())
    found = kernels(asked or 90)
    print(table_of_loops(asked or 90) + "\n")
    print(table(sorted(found, key=lambda k: (k.name, order.index(k.logits), k.labels))))


if __name__ == "__main__":
    main()
