"""What an operand's axes may be of the logits', said as an index that makes them just that."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

_MOST = 6  # that a message lists


def spelled(name: str, value: Any) -> str:
    """The name of what a user passed, or of what becomes of it, which has an index."""
    return name if isinstance(value, Array | np.ndarray) else f"jnp.asarray({name})"


def _readings(own: Sequence[int], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The logits' axes, in order, that axes of these sizes may be; those of size 1 are none."""
    sizes = [size for size in own if size != 1]
    every = itertools.combinations(range(len(shape)), len(sizes))
    fits = (axes for axes in every if all(shape[a] == d for a, d in zip(axes, sizes, strict=True)))
    return list(itertools.islice(fits, _MOST))


def _indexed(name: str, own: Sequence[int], axes: Sequence[int], rank: int, strip: bool) -> str:
    """The operand with its axes at those of the logits, and sizes of 1 at the others.

    Sizes of 1 that the operand has already stay, or go where they are too many.
    """
    index: list[str] = []
    ends = iter([*axes, rank])
    start, ones, end = 0, 0, next(ends)
    for size in [*own, None]:
        if size == 1:
            ones += 1
            continue
        gap = end - start
        index += [":"] * min(ones, gap) + ["None"] * (gap - ones) + ["0"] * (ones - gap)
        if size is not None:
            index.append(":")
            start, ones, end = end + 1, 0, next(ends)
    while index and index[-1] == ":":
        index.pop()
    while strip and index and index[0] == "None":
        index.pop(0)
    return f"{name}[{', '.join(index)}]" if index else name


def _listed(axes: Sequence[int]) -> str:
    if not axes:
        return "as one number"
    *most, last = map(str, axes)
    return f"for axes {', '.join(most)} and {last}" if most else f"for axis {last}"


def fixes(
    name: str,
    own: Sequence[int],
    shape: Sequence[int],
    *,
    fix: str = "{}",
    of: str = "logits",
    full: bool = False,
) -> str:
    """The fix for each of the readings, with what the operand becomes in it; "" for none.

    That has as many axes as the logits if it is to be full, else no size of 1 in front.
    """
    texts: list[str] = []
    for axes in _readings(own, shape):
        which = _listed(axes) + (f" of the {of}" if axes and not texts else "")
        indexed = _indexed(name, own, axes, len(shape), strip=not full)
        texts.append(f"{which}, {fix.format(indexed)}")
    return "; ".join(texts)


def fixes_of_labels(name: str, labels: Array | np.ndarray, shape: Sequence[int], of: str) -> str:
    """What to do about labels of another shape: all that they may mean; "" for nothing."""
    own = labels.shape
    if [size for size in own if size != 1] == [size for size in shape if size != 1]:
        return f"reshape one to the other, for example {name}.reshape({of}.shape)"
    texts: list[str] = []
    if jnp.issubdtype(labels.dtype, jnp.integer) and (indices := _class_indices(name, own, shape)):
        texts.append(f"for class indices, {' or '.join(indices)}")
    if repeated := fixes(name, own, shape, fix=f"jnp.broadcast_to({{}}, {of}.shape)", of=of):
        texts.append(f"to repeat them along the other axes, {repeated}")
    if moved := _transposed(name, own, shape):
        texts.append(f"to move their axes, {' or '.join(moved)}")
    return "; ".join(texts)


def _class_indices(name: str, own: Sequence[int], shape: Sequence[int]) -> list[str]:
    """One-hot labels for each axis that may be that of the classes, the last one first."""
    texts: list[str] = []
    for axis in reversed(range(len(shape))):
        before, after = tuple(shape[:axis]), tuple(shape[axis + 1 :])
        where = f", axis={axis}" if after else ""
        if own == before + after:
            texts.append(f"jax.nn.one_hot({name}, {shape[axis]}{where})")
        elif own == (*before, 1, *after):
            index = ", ".join([*":" * axis, "0"])
            texts.append(f"jax.nn.one_hot({name}[{index}], {shape[axis]}{where})")
    return texts


def _transposed(name: str, own: Sequence[int], shape: Sequence[int]) -> list[str]:
    if len(own) != len(shape) or len(own) > _MOST or sorted(own) != sorted(shape):
        return []
    orders = itertools.permutations(range(len(own)))
    fits = (order for order in orders if tuple(own[a] for a in order) == tuple(shape))
    return [f"jnp.transpose({name}, {order})" for order in itertools.islice(fits, _MOST)]
