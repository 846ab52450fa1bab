"""The debug check: warns about values that a loss accepts but that are probably a mistake.

While it is off, a call reads a flag twice, and nothing is added to the program. While it is on,
each operand is reduced on its device to a few numbers, which a callback compares with the expected
values. The flag is part of the key of JAX's caches: a compiled function is compiled again.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_bce._reference import elements

_jax: Any = jax  # some parts have no types
_on = _jax.make_user_context(os.environ.get("JAX_BCE_CHECK", "") not in ("", "0"))

# Fewer logits than this may all be in [0, 1] by chance.
_MANY = 16
_Line = tuple[str, int]  # a file and the number of a line
_warned: set[tuple[_Line, str]] = set()


@contextmanager
def checking(on: bool = True) -> Iterator[None]:
    """Checks the values of every call, and warns about those that are probably a mistake.

    Use it for a run in which something is wrong. ``JAX_BCE_CHECK=1`` in the environment turns it on
    for a whole program. It warns about labels outside [0, 1] (class indices, -1 and 1, 0 and 255),
    NaN, logits that look like probabilities or labels, negative weights, a negative, infinite or
    NaN loss, and indices of labels that do not exist. Elements that `where` or ignore_label drop
    are not checked.

    Each warning is a UserWarning that starts with "jax_bce", names the line that called the loss
    and says what to do. It is shown once per line and kind of problem, also under jit, grad, vmap,
    scan and shard_map; the program continues. ``python -W "error:jax_bce"`` turns it into an error;
    in compiled code this is a ``JaxRuntimeError`` that ends with the text.

    Enter the context outside of jit: inside it, functions that jax.jit has already compiled are
    compiled again. Functions compiled ahead of time (``.lower().compile()``) are not checked, and
    jax.export cannot store a checked function.

    Args:
      on: If False, turns off a check that the environment turned on.

    Example:
      >>> import warnings, jax.numpy as jnp, jax_bce
      >>> with warnings.catch_warnings(record=True) as caught, jax_bce.checking():
      ...     warnings.simplefilter("always")
      ...     _ = jax_bce.loss(jnp.array([0.5, -2.0, 1.5]), jnp.array([-1, 1, 1]))
      >>> print(caught[0].message)
      jax_bce: labels are -1 and 1, not 0 and 1: use (labels + 1) / 2.
    """
    _warned.clear()
    with _on(on):
        yield
        _jax.effects_barrier()


def is_on() -> bool:
    """Whether calls are checked."""
    return bool(_on.value)


# Each element has the first kind that fits: "whole" is any other whole number, and so on.
_KINDS = ("nan", "infinite", "-1", "0", "1", "255", "whole", "between 0 and 1", "other")


class Found(NamedTuple):
    """A summary of an array: kinds of elements, their number, and the finite extremes."""

    kinds: Any
    count: Any
    least: Any
    greatest: Any

    def any(self, kind: str) -> Any:
        """Whether some element has that kind."""
        return self.kinds[_KINDS.index(kind)]

    def only(self, *kinds: str) -> bool:
        """Whether each finite element has one of the kinds."""
        return not any(self.any(kind) for kind in _KINDS[2:] if kind not in kinds)

    def within(self, low: float, high: float) -> Any:
        """Whether each finite element is between low and high."""
        return (self.least >= low) & (self.greatest <= high)


@jax.jit
def _look(values: Array, keep: Array | None) -> Found:
    """Summarizes an array. Creates no NaN, which jax_debug_nans would report."""
    values = values.astype(jnp.promote_types(values.dtype, np.float32))
    finite = jnp.isfinite(values)
    tests = [jnp.isnan(values), ~finite, *(values == number for number in (-1, 0, 1, 255))]
    tests += [values == jnp.round(values), (values > 0) & (values < 1), finite]
    exists = jnp.ones(values.shape, bool) if keep is None else keep | jnp.zeros(values.shape, bool)
    rest, kinds = exists, []
    for test in tests:
        kinds.append(jnp.any(rest & test))
        rest = rest & ~test
    most = np.finfo(values.dtype).max
    return Found(
        jnp.stack(kinds),
        jnp.sum(exists, dtype=np.float32),
        jnp.min(jnp.where(exists & finite, values, most), initial=most),
        jnp.max(jnp.where(exists & finite, values, -most), initial=-most),
    )


@jax.custom_batching.custom_vmap
def _of_all(found: Found) -> Found:
    """Under vmap, merges the summaries of all mapped arrays, so that one callback is enough."""
    return found


@_of_all.def_vmap
def _of_all_mapped(axis_size: int, in_batched: list[Found], found: Found) -> tuple[Found, Found]:
    kinds, count, least, greatest = (
        value if mapped else jnp.broadcast_to(value, (axis_size, *value.shape))
        for value, mapped in zip(found, in_batched[0], strict=True)
    )
    merged = Found(
        jnp.any(kinds, axis=0),
        jnp.sum(count, axis=0),
        jnp.min(least, axis=0),
        jnp.max(greatest, axis=0),
    )
    return _of_all(merged), Found(*(False for _ in found))


def _about_labels(found: Found) -> str | None:
    if found.within(0, 1):
        return None
    if found.only("-1", "1"):
        return "are -1 and 1, not 0 and 1: use (labels + 1) / 2"
    if found.only("-1", "0", "1"):
        return (
            "are -1, 0 and 1: if -1 means that there is no label, pass ignore_label=-1; if "
            "it is the negative class, use labels > 0"
        )
    if found.only("0", "255"):
        return "are 0 and 255, not 0 and 1: use labels > 0"
    if found.least == 1 and found.greatest == 2 and found.only("1", "whole"):
        return "are 1 and 2, not 0 and 1: use labels == 2"
    if found.least >= 0 and found.only("0", "1", "255", "whole"):
        return (
            f"are whole numbers up to {found.greatest:g}: for class indices, use "
            f"jax.nn.one_hot(labels, {found.greatest + 1:g}), or labels == k for class k against "
            "the rest; for pixels, labels / 255"
        )
    return (
        f"lie between {found.least:.8g} and {found.greatest:.8g}, outside [0, 1]: they must be "
        "probabilities of the positive class, and come second, after the logits"
    )


def _about_logits(found: Found) -> str | None:
    if found.count < _MANY or found.least == found.greatest:
        return None
    if found.only("0", "1"):
        return "are all 0 or 1, as labels are: logits come first, labels second"
    if found.only("0", "1", "between 0 and 1"):
        return (
            "all lie in [0, 1], as probabilities do: pass the model's scores from before "
            "its sigmoid (leave that layer out, or use jax_bce.logits_of), or call "
            "jax_bce.loss_from_probs"
        )
    return None


def _about_probs(found: Found) -> str | None:
    if found.within(0, 1):
        return None
    return (
        f"lie between {found.least:.8g} and {found.greatest:.8g}, outside [0, 1]: for "
        "raw scores, call jax_bce.loss"
    )


def _about_positives(shape: tuple[int, int], of_all: bool, found: Found) -> str | None:
    if found.greatest > np.float32(shape[1] - 1):
        return (
            f"go up to {found.greatest:.8g}, and the last of {shape[1]} labels is {shape[1] - 1}: "
            "what is beyond counts as padding, not as a label; label indices start at 0"
        )
    if found.least < -1:
        return f"go down to {found.least:.8g}, which counts as padding: pad with -1"
    if of_all and found.only("0", "1"):
        return f"of shape {shape} are 0 and 1 alone: pass a matrix of labels as labels"
    return None


def _about_weights(found: Found) -> str | None:
    if found.least >= 0:
        return None
    return f"goes down to {found.least:g}, and the loss then has no minimum: make it 0 or more"


def _about_loss(found: Found) -> str | None:
    if found.least >= 0:
        return None
    return (
        f"goes down to {found.least:g}, below 0: some label lies outside [0, 1], or a "
        "weight, the normalizer or alpha is negative"
    )


class _Judge(NamedTuple):
    """The values that an array should have, and the warnings otherwise."""

    low: float
    high: float
    about: Callable[[Found], str | None]
    nan: str
    infinite: str


_TRACE = (
    "jax.config.update('jax_debug_nans', True) finds where they arise; drop padding with where="
)
_NO_WEIGHT = "drop elements with where=, not by their weight"
_WEIGHTS = _Judge(0, np.inf, _about_weights, _NO_WEIGHT, _NO_WEIGHT)
_JUDGES = {
    "logits": _Judge(
        -np.inf, np.inf, _about_logits, _TRACE, "the model overflows; drop padding with where="
    ),
    "probs": _Judge(0, 1, _about_probs, _TRACE, "for raw scores, call jax_bce.loss"),
    "labels": _Judge(
        0, 1, _about_labels, "drop them with where=~jnp.isnan(labels)", "use values from 0 to 1"
    ),
    "weight": _WEIGHTS,
    "sample_weight": _WEIGHTS,
    "pos_weight": _WEIGHTS,
    "loss": _Judge(
        0,
        np.inf,
        _about_loss,
        "a logit, a label, a weight or the normalizer is NaN",
        "an infinite logit, or a probability of exactly 0 or 1, meets the other label; for "
        "probabilities, pass epsilon=1e-7",
    ),
}


def problems(name: str, found: Found, judges: Mapping[str, _Judge] = _JUDGES) -> list[str]:
    """Describes what is wrong with the array of that name."""
    judge, said = judges[name], []
    if found.any("nan"):
        said.append(f"{name} with NaN: {judge.nan}")
    if found.any("infinite"):
        said.append(f"{name} with infinity: {judge.infinite}")
    about = judge.about(found) if found.least <= found.greatest else None  # some are finite
    return said + ([f"{name} {about}"] if about else [])


def _caller() -> _Line:
    """The line that called this package, directly or through JAX or Keras."""
    frame: Any = sys._getframe()
    between = ("jax_bce", "jax", "keras")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in between:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _warn(line: _Line, judges: Mapping[str, _Judge], found: Mapping[str, Found]) -> None:
    for name, values in found.items():
        # NumPy, not JAX arrays: a callback must not wait for the device that waits for it.
        for problem in problems(name, Found(*map(np.asarray, values)), judges):
            without_numbers = problem.translate(dict.fromkeys(map(ord, "0123456789.e+-")))
            if (line, without_numbers) not in _warned:
                warnings.warn_explicit(f"jax_bce: {problem}.", UserWarning, *line)
                _warned.add((line, without_numbers))


def _look_at(
    arrays: Mapping[str, Array],
    keep: Array | None = None,
    judges: Mapping[str, _Judge] = _JUDGES,
) -> None:
    """Warns the user, and adds checks for JAX's checkify, which have no effect without it."""
    from jax.experimental import checkify

    still = {name: jax.lax.stop_gradient(values) for name, values in arrays.items()}
    found = {name: _of_all(_look(values, keep)) for name, values in still.items()}
    jax.debug.callback(functools.partial(_warn, _caller(), judges), found)
    for name, values in found.items():
        low, high = judges[name][:2]
        checkify.debug_check(
            values.within(low, high) & ~values.any("nan") & ~values.any("infinite"),
            f"jax_bce: {name} should be finite and lie between {low} and {high}; the finite ones "
            "lie between {} and {}",
            *(values.least, values.greatest),
        )


def operands(name: str, given: Sequence[Array], modifiers: Sequence[str]) -> None:
    """Checks the operands of the primitive if the check is on; `name` is that of the logits."""
    if not is_on():
        return
    logits, labels, _, smoothing, *more = given
    named = dict(zip(modifiers, more, strict=True))
    weights = {option: array for option, array in named.items() if option in _JUDGES}
    keep = elements(logits, labels, smoothing, named).keep
    _look_at({name: logits, "labels": labels} | weights, keep)


def positives(indices: Array, shape: tuple[int, int]) -> None:
    """Checks indices of labels if the check is on; `shape` is (rows, labels)."""
    if not is_on():
        return
    # Of one or two labels, 0 and 1 are indices.
    about = functools.partial(_about_positives, shape, indices.shape == shape and shape[1] > 2)
    _look_at({"positives": indices}, judges={"positives": _Judge(-1, shape[1] - 1, about, "", "")})


def loss(values: Array) -> Array:
    """Checks the loss; checkify's float checks see the multiplication, but not the kernel."""
    if not is_on():
        return values
    _look_at({"loss": values})
    return values * 1
