"""What a compiled program does, read off its optimized HLO: passes, kernel calls, collectives."""

import math
import re
from collections.abc import Iterator

from jax.stages import Compiled

TARGET = "jax_bce_v3_"
# They name a buffer, or a part of one, and move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
COLLECTIVE = re.compile(r"(all-|collective-|reduce-scatter|ragged-)")


def _largest(shapes: str) -> int:
    """Elements of the largest array among the shapes, as in "(f32[], f32[128,8]{1,0})"."""
    dimensions = re.findall(r"[a-z]\w*\[([\d,]*)\]", shapes)
    return max((math.prod(map(int, filter(None, d.split(",")))) for d in dimensions), default=0)


def _instructions(text: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    """Of each its name, its results' shapes, its opcode, its operands' names, and the rest."""
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            name, shapes, opcode, rest = match.groups()
            yield name, shapes, opcode, re.findall(r"%([\w.-]+)", rest.split(")")[0]), rest


def _passes(text: str, size: int) -> list[str]:
    found, elements = [], {}
    for name, shapes, opcode, operands, rest in _instructions(text):
        elements[name] = _largest(shapes)
        touched = max([elements[name], *(elements.get(operand, 0) for operand in operands)])
        if opcode not in FREE and touched >= size:
            target = re.search(r'custom_call_target="([^"]+)"', rest)
            found.append(target[1] if target else opcode)
    return found


def _entry(compiled: Compiled) -> str:
    text = compiled.as_text()
    return text[text.index("ENTRY") :]


def passes(compiled: Compiled, size: int) -> list[str]:
    """The instructions with `size` elements or more in a result or an operand.

    A custom call is named by its target, any other instruction by its opcode. Those that a fusion
    or a loop is made of are among them.
    """
    return _passes(compiled.as_text(), size)


def passes_outside_loops(compiled: Compiled, size: int) -> list[str]:
    """The same, but a fusion is one, and so is a loop."""
    return _passes(_entry(compiled), size)


def bytes_of(shapes: str) -> int:
    """Of all arrays in, for example, "(f32[], bf16[128,8]{1,0})"."""
    total = 0
    for bits, dimensions in re.findall(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]", shapes):
        total += int(bits or 8) // 8 * math.prod(map(int, filter(None, dimensions.split(","))))
    return total


def kernel_bytes(compiled: Compiled) -> dict[str, tuple[int, int]]:
    """How many bytes each kernel of the program, outside its loops, reads and writes."""
    moved, shapes_of = {}, {}
    for name, shapes, opcode, operands, _ in _instructions(_entry(compiled)):
        shapes_of[name] = shapes
        if opcode not in FREE and not COLLECTIVE.match(opcode):
            moved[name] = sum(bytes_of(shapes_of[each]) for each in operands), bytes_of(shapes)
    return moved


def bytes_moved(compiled: Compiled) -> int:
    """What all of them read and write."""
    return sum(map(sum, kernel_bytes(compiled).values()))


def kernel_calls(compiled: Compiled) -> list[str]:
    return re.findall(rf'custom_call_target="({TARGET}\w+)"', compiled.as_text())


def collectives(compiled: Compiled) -> list[str]:
    """What devices send each other, with the shape that each of them receives."""
    return [
        f"{opcode.removesuffix('-done')} {re.sub(r'{[^}]*}', '', shapes)}"
        for _, shapes, opcode, _, _ in _instructions(compiled.as_text())
        if COLLECTIVE.match(opcode) and not opcode.endswith("-start")
    ]
