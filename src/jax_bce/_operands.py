"""Converts what a user passes to arrays, or raises an error that says what to pass instead.

A known value stays a NumPy array until `operand`: under jit, jnp.asarray would trace it, and its
range could not be checked.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

AnyArray = Array | np.ndarray
FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMBERS = (*FLOATS, "bool", "int8", "uint8", "int16", "int32", "int64")
_PLAIN = (bool, int, float, complex)
_PYTHON = (*_PLAIN, np.generic)
_SCORES = ("logits", "probs", "input", "inputs", "y_pred")  # outputs of a model
_LABELS = ("labels", "target", "targets", "y_true")
_MISSING = ("NoneType", "NAType", "NaTType")


def unwrapped(name: str, value: ArrayLike) -> AnyArray:
    """The JAX array (traced or not) or NumPy array that a value is, wraps or converts to."""
    if isinstance(value, Array):
        return value
    if isinstance(value, _PLAIN):
        return np.asarray(value)
    if hasattr(value, "__jax_array__"):
        return unwrapped(name, value.__jax_array__())
    if isinstance(value, list | tuple | range):
        return _stacked(name, value)
    problem = _problem(name, value)
    if not problem:
        try:
            return np.asarray(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            problem = str(error).partition("\n")[0].rstrip(".")
            if hasattr(value, "detach"):  # a tensor of PyTorch
                problem = f"use jnp.from_dlpack({name}.detach())"
    raise _no_numbers(name, type(value).__name__, problem)


def _no_numbers(name: str, what: str, problem: str) -> TypeError:
    return TypeError(f"{name} must be an array of numbers, got {what}: {problem}.")


def _stacked(name: str, values: Sequence[Any]) -> AnyArray:
    """The array for a list of numbers, or of anything else that is accepted."""
    if all(isinstance(value, _PYTHON) for value in values):
        return np.asarray(values)
    _refuse_outputs(name, values)
    parts = [unwrapped(name, value) for value in values]
    shapes = dict.fromkeys(str(part.shape) for part in parts)
    if len(shapes) > 1:
        found = " and ".join(shapes)
        fix = "pad all with -1 to" if name == "positives" else "pass arrays of"
        raise ValueError(f"{name} has arrays of shapes {found}: {fix} one shape.")
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        return jnp.stack([jnp.asarray(part) for part in parts])
    return np.stack([np.asarray(part) for part in parts])


def _refuse_outputs(name: str, values: Sequence[Any]) -> None:
    """Raises if a model returned more than its scores: states, None, or several arrays."""
    arrays = [i for i, value in enumerate(values) if getattr(value, "ndim", 0)]
    odd = any(isinstance(v, dict) or (v is None and arrays) for v in values)
    if odd or (arrays and isinstance(values, tuple) and name in _SCORES):
        what = f"a {'list' if isinstance(values, list) else 'tuple'} of {len(values)}"
        raise _no_numbers(name, what, f"pass one of them, such as {name}[{[*arrays, 0][0]}]")


def _problem(name: str, value: Any) -> str | None:
    """How to fix a value that NumPy would convert wrongly, slowly or not at all, or None."""
    for method in ("toarray", "todense"):  # of SciPy, and of jax.experimental.sparse
        if hasattr(value, method):
            return f"it is sparse, use {name}.{method}()"
    if getattr(value, "is_sparse", False) is True:
        return f"it is sparse, use {name}.to_dense()"
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        return f"some values are masked, use {name}.filled(0) with where=~{name}.mask"
    if _has_missing(value):
        return _fill(name)
    if isinstance(value, dict) and value:
        return f"pass one of its values, such as {name}[{next(iter(value))!r}]"
    if value is None:
        return "pass numbers"
    if isinstance(value, str):
        return _compare(name, f"np.array({name})", value)
    if isinstance(value, (np.ndarray, *_PYTHON)) or hasattr(value, "__array__"):
        return None
    try:
        memoryview(value)
    except TypeError:
        return f"pass numbers, such as np.array({name}, np.float32) if it can be converted"
    return None


def _has_missing(value: Any) -> bool:
    """Whether a pandas, Polars or Arrow column has missing values, which NumPy converts to NaN."""
    if hasattr(value, "null_count"):
        count = value.null_count
        return bool(np.any(np.asarray(count() if callable(count) else count)))
    dtypes = getattr(value, "dtypes", getattr(value, "dtype", None))
    extended = any(hasattr(dtype, "na_value") for dtype in np.ravel(np.asarray(dtypes, object)))
    return extended and hasattr(value, "isna") and bool(np.any(np.asarray(value.isna())))


def _fill(name: str) -> str:
    marked = ", for example labels.fillna(-1) with ignore_label=-1" if name == "labels" else ""
    return f"some values are missing, fill them or drop their rows{marked}"


def known(array: AnyArray) -> np.ndarray | None:
    """The numbers, or None if they are traced or other processes hold some of them."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return None
    return np.asarray(array)


# NumPy builds the name at each call.
_name_of = functools.cache(lambda dtype: dtype.name)


def typed(
    name: str, value: ArrayLike, dtypes: Sequence[str] = NUMBERS, fix: str | None = None
) -> AnyArray:
    """`unwrapped`, restricted to some dtypes; the fix is suggested for other real numbers."""
    array = unwrapped(name, value)
    dtype = array.dtype
    native = getattr(dtype, "isnative", True)
    if native and _name_of(dtype) in dtypes:
        return array
    if dtype.name != "bool" and not jnp.issubdtype(dtype, jnp.number):
        of = "text" if getattr(dtype, "kind", None) in tuple("UST") else f"dtype {dtype.name}"
        what = f"{type(array).__name__} of {of}"
        fix = _that_runs(name, value, _fix_of_no_numbers(name, array, dtypes))
        raise _no_numbers(name, what, fix)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        fix = f"use {name}.real or abs({name})"
    elif not native and dtype.newbyteorder("=").name in dtypes:
        fix = f"use {name}.astype(jnp.{dtype.newbyteorder('=').name})"
    elif fix is None or dtype.itemsize > 8:
        fix = f"use {name}.astype(jnp.{_nearest(dtype)})"
    got = dtype.name if native else dtype.str
    fix = _that_runs(name, value, fix)
    raise TypeError(f"{name} must be one of {list(dtypes)}, got {got}: {fix}.")


def _that_runs(name: str, value: Any, fix: str) -> str:
    """The fix, with a conversion to an array if the value has no array methods, such as a list."""
    if hasattr(value, "astype"):
        return fix
    return re.sub(rf"\b{name}(?=\.astype|\.real| [>=]|\))", f"np.asarray({name})", fix)


def _nearest(dtype: np.dtype) -> str:
    """The supported dtype that holds the numbers of another dtype, or rounds them."""
    if jnp.issubdtype(dtype, jnp.integer):
        return {1: "int8", 2: "int32"}.get(dtype.itemsize, "float32")
    return "float64" if dtype.itemsize > 8 else "float32"


def _fix_of_no_numbers(name: str, array: AnyArray, dtypes: Sequence[str]) -> str:
    """The fix for text, objects, dates, records and keys."""
    if isinstance(array, Array):
        return "pass numbers"
    if array.dtype.names:
        return f"pass one of its fields, such as {name}[{array.dtype.names[0]!r}]"
    entries = array.ravel().tolist() if array.dtype.kind in "OUST" else []
    if any(type(entry).__name__ in _MISSING or entry is np.nan for entry in entries):
        return _fill(name)
    try:
        if [float(entry) for entry in entries]:
            return f"use {name}.astype({'bool' if dtypes == ('bool',) else 'jnp.float32'})"
    except (TypeError, ValueError):
        pass
    texts = (entry for entry in entries if isinstance(entry, str | bytes))
    return _compare(name, name, next(texts, None))


def _compare(name: str, array: str, text: str | bytes | None) -> str:
    """The fix for text, which may be labels."""
    compare = f", or compare, such as {array} == {text!r}"
    return "pass numbers" + compare * (name in _LABELS and text is not None)


def operand(
    name: str, value: ArrayLike, dtypes: Sequence[str] = NUMBERS, fix: str | None = None
) -> AnyArray:
    """`typed`, converted to a dtype that JAX supports; raises for arrays in host memory."""
    # A plain 1 after a plain 0.5 is no new dtype, which would compile the call again.
    if type(value) is int and dtypes is NUMBERS and abs(value) <= 2**24:  # which float32 holds
        value = float(value)
    array = typed(name, value, dtypes, fix)
    if not isinstance(array, Array):
        return _as_jax_keeps(name, array)
    space = getattr(jax.typeof(array), "memory_space", None)
    if space and space.name == "Host":
        raise ValueError(
            f"{name} must be in device memory, got host memory: use "
            f"jax.device_put({name}, jax.memory.Space.Device)."
        )
    return array


def _as_jax_keeps(name: str, array: np.ndarray) -> np.ndarray:
    """At most 32 bits unless x64 is enabled; raises if an integer does not fit."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    if array.dtype == np.int64:
        info = np.iinfo(np.int32)
        for number in (array.min(initial=0), array.max(initial=0)):
            if not info.min <= number <= info.max:
                raise ValueError(
                    f"{name} contains {number}, but JAX stores integers in 32 bits: use "
                    f"np.float32({name}), or jax.config.update('jax_enable_x64', True) at the "
                    "start."
                )
    with np.errstate(over="ignore"):  # overflow gives infinity, as everywhere in JAX
        return array.astype(dtype)


class _Range(NamedTuple):
    text: str
    holds: Callable[[np.ndarray], np.ndarray]
    fix: str


def _not_negative(fix: str) -> _Range:
    return _Range("finite and at least 0", lambda v: (v >= 0) & np.isfinite(v), fix)


_RANGES = {
    "label_smoothing": _Range(
        "from 0 to 1", lambda v: (v >= 0) & (v <= 1), "label_smoothing=0 leaves labels as they are"
    ),
    "alpha": _Range(
        "from 0 to 1", lambda v: (v >= 0) & (v <= 1), "alpha=None weights neither class"
    ),
    "gamma": _not_negative("gamma=0 is the cross-entropy"),
    "gamma_neg": _not_negative("gamma_neg=0 leaves negatives as they are"),
    "gamma_pos": _not_negative("gamma_pos=0 leaves positives as they are"),
    "clip": _Range(
        "at least 0 and below 1", lambda v: (v >= 0) & (v < 1), "clip=0 drops no negatives"
    ),
    "epsilon": _Range(
        "at least 0 and below 0.5", lambda v: (v >= 0) & (v < 0.5), "epsilon=None clips nothing"
    ),
    "log_epsilon": _not_negative("log_epsilon=0 adds nothing"),
    "hess_floor": _not_negative("hess_floor=0 sets no floor"),
}


def ranged(name: str, value: ArrayLike) -> AnyArray:
    """One number or several; raises if a known one is outside the range for this name."""
    # NumPy takes microseconds for each step with one number, and an eager call has several.
    if type(value) is int or type(value) is float:
        return _ranged_number(name, value)
    return _ranged(name, value)


def _ranged(name: str, value: ArrayLike) -> AnyArray:
    text, holds, fix = _RANGES[name]
    if value is None:
        raise TypeError(f"{name} must be a number, {text}, got None: {fix}.")
    array = typed(name, value)
    if array.dtype == bool:
        raise TypeError(f"{name} must be a number, {text}, got bool: {fix}.")
    numbers = known(array)
    if numbers is not None and not (held := holds(numbers.astype(np.float64))).all():
        at = tuple(map(int, np.argwhere(~held)[0]))
        where = f" at {list(at)}" if at else ""
        raise ValueError(f"{name} must be {text}, got {numbers[at]!s}{where}: {fix}.")
    return array


_ranged_number = functools.lru_cache(maxsize=256, typed=True)(_ranged)
