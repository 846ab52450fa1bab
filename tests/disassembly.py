"""What the compiler made of the CUDA kernels: the built module's disassembly, as Markdown tables.

    python tests/disassembly.py                       # each architecture in short, 90 in full
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
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jax_bce import _kernels

# The templates' arguments, as a symbol holds them: the logits' dtype and the width of a label.
LOGITS = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}
LABELS = {"": 0, "h": 1, "t": 2, "j": 4, "m": 8}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SYMBOL = re.compile(rf"\d([a-z_]+)I({'|'.join(LOGITS)})([{''.join(LABELS)}]?)")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)")

LISTED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
BRANCH = re.compile(r"(@\S+ )?BRA\S*(.*) 0x([0-9a-f]+)")
ACCESS = re.compile(r"(@\S+ )?(LDG|STG)\.E(?:\.[A-Z]\w*)*?(?:\.[US]?(\d+))?(?:\.[A-Z]+)* ")
# No evaluation of an element does without: reciprocals, and additions in float64.
ARITHMETIC = re.compile(r"(@\S+ )?(MUFU|DADD)")


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


def innermost_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Their first and last instructions."""
    loops = [
        (first, last)
        for last, instruction in enumerate(code)
        for first in instruction.followers
        if first < last
    ]
    return [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]


def common_way(
    code: list[Instruction], first: int, last: int, logit_bytes: int, label_bytes: int
) -> list[Instruction]:
    """The instructions of one turn of an innermost loop, for common elements; or nothing.

    The loop holds the arithmetic twice, for common elements and for all others; also what only its
    last turn needs, or a launch may not ask for. The common way leaves out no arithmetic, and for
    each logit and label that it loads it stores one result of the logit's size; of those ways it is
    the shortest. Should another way hold more arithmetic, that one is taken and is longer: too many
    instructions may be counted, not too few.
    """
    # For each place and each number of bits stored before it: how good the best way there is, and
    # the place and number before on it. Without inner loops, a way only goes forward.
    best: dict = {place: {} for place in range(first, last + 2)}
    best[first][0] = ((0, 0, 0), None)
    for place in range(first, last + 1):
        instruction = code[place]
        followers = [f for f in instruction.followers if place < f <= last]
        if place == last:
            followers = [last + 1]
        for stored, ((arithmetic, loaded, length), _) in best[place].items():
            arithmetic += bool(ARITHMETIC.match(instruction.text))
            quality = (arithmetic, loaded + instruction.width("LDG"), length - 1)
            width = instruction.width("STG")
            # A store under a condition is not always asked for.
            for then in (
                {stored + width, stored} if instruction.is_conditional else {stored + width}
            ):
                for follower in followers:
                    if then not in best[follower] or quality > best[follower][then][0]:
                        best[follower][then] = (quality, (place, stored))
    ends = [
        (quality, before)
        for stored, (quality, before) in best[last + 1].items()
        if 0 < stored * (logit_bytes + label_bytes) == quality[1] * logit_bytes
    ]
    way = []
    _, before = max(ends, default=(None, None))
    while before is not None:
        place, stored = before
        way.append(code[place])
        _, before = best[place][stored]
    return way[::-1]


@dataclass
class Kernel:
    architecture: int
    symbol: str
    registers: int
    stack: int  # bytes of a thread, for what did not fit into registers

    def __post_init__(self) -> None:
        self.name, logits, label = SYMBOL.search(self.symbol).groups()
        self.logits, self.label_bytes = LOGITS[logits], LABELS[label]

    @cached_property
    def main_loop(self) -> list[Instruction]:
        """One turn of it: of the innermost loops, the one that loads four elements at a time."""
        code = parse(cuobjdump("-sass", "-arch", f"sm_{self.architecture}", "-fun", self.symbol))
        sizes = BYTES[self.logits], self.label_bytes
        ways = [common_way(code, *loop, *sizes) for loop in innermost_loops(code)]
        widths = {min(128, 32 * size) for size in sizes}
        found = [
            way
            for way in ways
            if way and widths == {width for each in way if (width := each.width("LDG"))}
        ]
        assert len(found) == 1, f"{len(found)} main loops in {self}"
        return found[0]

    @property
    def instructions_per_element(self) -> float:
        elements = sum(self.widths("LDG")) / 8 / (BYTES[self.logits] + self.label_bytes)
        return len(self.main_loop) / elements

    def widths(self, operation: str) -> list[int]:
        """Of the main loop's loads ("LDG") or stores ("STG"), in bits."""
        return [width for i in self.main_loop if (width := i.width(operation))]


def kernels(architecture: int) -> list[Kernel]:
    usage = USAGE.findall(cuobjdump("-res-usage", "-arch", f"sm_{architecture}"))
    return [
        Kernel(architecture, symbol, int(registers), int(stack) + int(local))
        for symbol, registers, stack, local in usage
    ]


@cache
def long_rows(architecture: int, logits: str, label_bytes: int) -> Kernel:
    wanted = ("long_rows", logits, label_bytes)
    (found,) = (k for k in kernels(architecture) if (k.name, k.logits, k.label_bytes) == wanted)
    return found


def table(rows: list[Kernel]) -> str:
    lines = [
        "| | kernel | logits | label bytes | registers | stack | loads | stores "
        "| instructions per element |",
        "| --: | --- | --- " + "| --: " * 6 + "|",
    ]
    for kernel in rows:
        cells = [kernel.architecture, kernel.name, kernel.logits, kernel.label_bytes or ""]
        cells += [kernel.registers, kernel.stack]
        if kernel.label_bytes:
            cells += [", ".join(map(str, kernel.widths(each))) for each in ("LDG", "STG")]
            cells += [f"{kernel.instructions_per_element:.1f}"]
        else:  # it has no elements, only their sums
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", type=int, help="all kernels of this one, nothing else")
    asked = parser.parse_args().architecture
    if reason := missing():
        sys.exit(reason)
    if not asked:
        print(f"Machine code for {', '.join(map(str, architectures('elf')))}; ", end="")
        print(f"PTX of {', '.join(map(str, architectures('ptx')))}.\n")
        types = ("float32", 4), ("bfloat16", 1)
        print(table([long_rows(a, *t) for t in types for a in architectures("elf")]) + "\n")
    order = list(BYTES)
    found = kernels(asked or 90)
    print(table(sorted(found, key=lambda k: (k.name, order.index(k.logits), k.label_bytes))))


if __name__ == "__main__":
    main()
