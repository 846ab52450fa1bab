"""Suggests how to index an operand so that its axes line up with those of the logits."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

_MOST = 6  # suggestions in one message


def spelled(name: str, value: Any) -> str:
    """The argument's name, converted to an array if the user passed something else."""
    return name if isinstance(value, Array | np.ndarray) else f"jnp.asarray({name})"


def _readings(own: Sequence[int], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The logits' axes, in order, that may match axes of these sizes; ignores axes of size 1."""
    sizes = [size for size in own if size != 1]
    every = itertools.combinations(range(len(shape)), len(sizes))
    fits = (axes for axes in every if all(shape[a] == d for a, d in zip(axes, sizes, strict=True)))
    return list(itertools.islice(fits, _MOST))


def _indexed(name: str, own: Sequence[int], axes: Sequence[int], rank: int, strip: bool) -> str:
    """Indexes the operand to move its axes to those of the logits, with size 1 elsewhere.

    Existing axes of size 1 are kept, or removed if there are too many.
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
    """The fix for each possible match, with the indexed operand filled in; "" if none matches.

    If `full`, the operand gets as many axes as the logits, otherwise no leading axes of size 1.
    """
    texts: list[str] = []
    for axes in _readings(own, shape):
        which = _listed(axes) + (f" of the {of}" if axes and not texts else "")
        indexed = _indexed(name, own, axes, len(shape), strip=not full)
        texts.append(f"{which}, {fix.format(indexed)}")
    return "; ".join(texts)


def fixes_of_labels(name: str, labels: Array | np.ndarray, shape: Sequence[int], of: str) -> str:
    """All fixes for labels of another shape, one for each meaning; "" if there is none."""
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
    """One-hot labels for each axis that may be the class axis, the last one first."""
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
