"""A direct call of a handler that is wrong ends in an error that names what is wrong with it.

Hypothesis draws calls that are right, of which most are then broken in one place. What is right is
evaluated; what is broken must be refused, with the name of the operand, result or attribute.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sample
from hypothesis import strategies as st

pytestmark = pytest.mark.any_jax

# What a call may break, in names of its parts, and the words of the error.
COMMON = ("weight", "sample_weight", "pos_weight", "where", "ignore_label")
FOCAL = ("alpha", "gamma", "gamma_pos", "clip")
NAMES = (*COMMON, *FOCAL, "hess_floor")
CONSTANT_POWER = 1 << len(NAMES) + 2
TARGETS = {
    "loss": (1, 0),
    "loss_and_grad": (1, 1),
    "grad": (0, 1),
    "total": (1, 0),
    "hess_and_grad": (1, 1),
}
TYPES = (*oracle.FLOATS, *oracle.INTEGERS)
FOREIGN = tuple(
    np.dtype(name)
    for name in ("complex64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "int4")
)


@dataclass(frozen=True)
class Call:
    """The shape and dtype of each operand and result, and the attributes."""

    target: str
    operands: dict[str, tuple[tuple[int, ...], np.dtype]]
    results: dict[str, tuple[tuple[int, ...], np.dtype]]
    attributes: dict[str, object]
    shape: tuple[int, ...] = field(compare=False)
    rank: int = field(compare=False)  # of what is reduced

    @property
    def arithmetic(self) -> np.dtype:
        wide = self.operands["logits"][1] == oracle.FLOAT64
        return oracle.FLOAT64 if wide else oracle.FLOAT32

    @property
    def reduces(self) -> bool:
        return self.target != "grad" and self.rank > 0

    def with_operand(self, name: str, shape: tuple[int, ...] | None, dtype: object) -> "Call":
        old_shape, old_dtype = self.operands[name]
        new = (old_shape if shape is None else shape, np.dtype(dtype or old_dtype))
        return replace(self, operands=self.operands | {name: new})

    def run(self) -> list[np.ndarray]:
        # Zeros, but for weights and divisors: the values are not what is tested here.
        zeros = ("logits", "labels", "smoothing", "ignore_label", "divisor_low")
        operands = [
            jnp.full(shape, 0 if name in zeros else 1, dtype)
            for name, (shape, dtype) in self.operands.items()
        ]
        results = [jax.ShapeDtypeStruct(*result) for result in self.results.values()]
        call = jax.ffi.ffi_call(f"jax_bce_v3_{self.target}", results, has_side_effect=True)
        return [*map(np.asarray, call(*operands, **self.attributes))]


@st.composite
def right_calls(draw: st.DrawFn) -> Call:
    target = draw(st.sampled_from([*TARGETS]))
    least = int(target == "total")  # a sum, over one dimension or more
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=least, max_size=4)))
    reduced = 0 if target == "hess_and_grad" else draw(st.integers(least, len(shape)))
    leading = len(shape) - reduced
    logits_dtype, labels_dtype = draw(st.sampled_from(oracle.FLOATS)), draw(st.sampled_from(TYPES))
    arithmetic = oracle.FLOAT64 if logits_dtype == oracle.FLOAT64 else oracle.FLOAT32
    loss, gradient = TARGETS[target]

    def broadcast(together: int) -> tuple[int, ...]:
        """Ones in the place of some dimensions, but of all or none after the first `together`."""
        if draw(st.booleans()):
            return draw(st.sampled_from([shape, ()]))
        free = [draw(st.sampled_from([1, size])) for size in shape[:together]]
        rest = shape[together:]
        return (*free, *(rest if draw(st.booleans()) else (1,) * len(rest)))

    def factor() -> tuple[int, ...]:
        """Which must not vary along what is reduced."""
        found = broadcast(leading)
        tied = (*found[:leading], *(1,) * reduced) if loss and reduced and found else found
        return tied

    operands = {
        "logits": (shape, logits_dtype),
        "labels": (broadcast(leading), labels_dtype),
        "scale": (factor(), arithmetic),
        "smoothing": (broadcast(leading) if not (loss and reduced) else factor(), arithmetic),
    }
    given = draw(st.sets(st.sampled_from(COMMON)))
    if target == "hess_and_grad":
        given = given | {"hess_floor"}
    elif draw(st.booleans()):
        given = given - {"pos_weight"} | {"gamma"} | draw(st.sets(st.sampled_from(FOCAL)))
    for name in NAMES:
        if name in given:
            weight = draw(st.sampled_from(TYPES))
            dtype = {"where": np.dtype(bool), "ignore_label": labels_dtype}.get(name, weight)
            operands[name] = (broadcast(len(shape)), dtype)
    modifiers = sum(1 << bit for bit, name in enumerate(NAMES) if name in given)
    modifiers |= draw(st.sampled_from([0, CONSTANT_POWER]))
    if draw(st.booleans()):
        modifiers |= 3 << len(NAMES)
        operands["divisor"] = operands["divisor_low"] = (factor(), arithmetic)

    narrow = [oracle.FLOAT64] if arithmetic == oracle.FLOAT64 else [*oracle.FLOATS[:3]]
    results = {}
    if loss:
        sums = draw(st.sampled_from([arithmetic, oracle.FLOAT64]))
        dtype = sums if reduced else draw(st.sampled_from(narrow))
        results["loss"] = (shape[:leading] if reduced else shape, dtype)
    if gradient:
        results["gradient"] = (shape, draw(st.sampled_from(narrow)))
    attributes = {
        "modifiers": np.int64(modifiers),
        "reduced_rank": np.int64(reduced),
        "count": np.int64(draw(st.integers(1, 10**6))),
    }
    return Call(target, operands, results, attributes, shape, reduced)


# Each returns the broken call and the words of its error, or None if this call has no such place.
Break = Callable[[st.DrawFn, Call], tuple[Call, str] | None]


def other_rank(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    name = draw(st.sampled_from([*call.operands][1:]))
    ranks = {1, 2, 3, 4, 5} - {len(call.shape)}
    shape = (1,) * draw(st.sampled_from(sorted(ranks)))
    return call.with_operand(name, shape, None), f"{name} and logits differ in rank"


def other_shape(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """A dimension that is neither that of the others nor 1."""
    wide = [d for d, size in enumerate(call.shape) if size > 1]
    names = [n for n, (shape, _) in call.operands.items() if shape and n != "logits"]
    if not wide or not names:
        return None
    name, d = draw(st.sampled_from(names)), draw(st.sampled_from(wide))
    shape = [*call.operands[name][0]]
    sizes = {*range(2, call.shape[d] + 4)} - {call.shape[d]}
    shape[d] = draw(st.sampled_from(sorted(sizes)))
    broken = call.with_operand(name, tuple(shape), None)
    return broken, f"{name} (must not vary|cannot be broadcast)|broadcast in some of the reduced"


def foreign_dtype(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    name = draw(st.sampled_from([*call.operands]))
    broken = call.with_operand(name, None, draw(st.sampled_from(FOREIGN)))
    words = "have an unsupported dtype|has an unsupported dtype|must be float64 for float64 logits"
    return broken, f"{name} ({words})"


def other_dtype(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """One that other operands may have."""
    factors = ("scale", "smoothing", "divisor", "divisor_low")
    names = [n for n in call.operands if n in (*factors, "logits", "where", "ignore_label")]
    name = draw(st.sampled_from(names))
    if name == "logits":
        dtype = draw(st.sampled_from(oracle.INTEGERS))
        return call.with_operand(name, None, dtype), "logits must be floating-point"
    dtype = draw(st.sampled_from([dtype for dtype in TYPES if dtype != call.operands[name][1]]))
    words = "must be float64" if name in factors else "has an unsupported dtype"
    return call.with_operand(name, None, dtype), f"{name} {words}"


def factor_that_varies(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    names = [name for name in call.operands if name in ("scale", "divisor", "divisor_low")]
    leading = len(call.shape) - call.rank
    if not call.reduces or np.prod(call.shape[leading:]) == 1:
        return None
    name = draw(st.sampled_from(names))
    return call.with_operand(name, call.shape, None), f"{name} must not vary"


def number_of_operands(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    operands = dict(call.operands)
    if draw(st.booleans()):
        operands["more"] = operands["labels"]
    else:
        operands.popitem()
    words = rf"needs {len(call.operands)} operands, got {len(operands)}|number of arguments"
    return replace(call, operands=operands), words


def bits(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """Another set of modifiers than is there, or none that exists."""
    right = int(call.attributes["modifiers"])
    wrong = draw(
        st.sampled_from([right ^ 1 << bit for bit in range(64) if 1 << bit != CONSTANT_POWER])
    )
    wrong -= (wrong >> 63) << 64
    attributes = call.attributes | {"modifiers": np.int64(wrong)}
    words = f"modifiers {wrong} needs|modifiers has a bit without a meaning: {wrong}"
    return replace(call, attributes=attributes), words


def half_a_focal_loss(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """Numbers of a focal loss without its gamma, or with a pos_weight."""
    right = int(call.attributes["modifiers"])
    operands = dict(call.operands)
    if "gamma" in operands and len({*operands}.intersection(FOCAL)) > 1:
        del operands["gamma"]
        name, words = "gamma", "gamma is missing"
    elif "pos_weight" in operands:
        name, words = "gamma", "focal loss has no pos_weight"
        last = [n for n in (*COMMON, "alpha") if n in operands][-1]
        items = [*operands.items()]
        place = [n for n, _ in items].index(last) + 1
        operands = dict([*items[:place], ("gamma", ((), call.arithmetic)), *items[place:]])
    else:
        return None
    attributes = call.attributes | {"modifiers": np.int64(right ^ 1 << NAMES.index(name))}
    return replace(call, operands=operands, attributes=attributes), words


def floor_of_hessians(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """None for the target that has it, or one for another."""
    operands = dict(call.operands)
    if call.target == "hess_and_grad":
        del operands["hess_floor"]
        words = "hess_floor is missing"
    else:
        place = [n for n in operands if not n.startswith("divisor")]
        items = [*operands.items()]
        floor = ("hess_floor", ((), call.arithmetic))
        operands = dict([*items[: len(place)], floor, *items[len(place) :]])
        words = "only hess_and_grad has a hess_floor"
    bit = 1 << NAMES.index("hess_floor")
    attributes = call.attributes | {"modifiers": np.int64(int(call.attributes["modifiers"]) ^ bit)}
    return replace(call, operands=operands, attributes=attributes), words


def gamma_of_hessians(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    if call.target != "hess_and_grad" or "pos_weight" in call.operands:
        return None
    items = [*call.operands.items()]
    place = [n for n, _ in items].index("hess_floor")
    operands = dict([*items[:place], ("gamma", ((), call.arithmetic)), *items[place:]])
    bit = 1 << NAMES.index("gamma")
    attributes = call.attributes | {"modifiers": np.int64(int(call.attributes["modifiers"]) | bit)}
    return replace(call, operands=operands, attributes=attributes), "hess_and_grad has no gamma"


def sum_of_hessians(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """A call that is right but for its sum."""
    if call.target != "hess_and_grad" or "divisor" in call.operands or not call.shape:
        return None
    reduced = draw(st.integers(1, len(call.shape)))
    names = [n for n in ("labels", "scale", "smoothing") if n in call.operands]
    operands = dict(call.operands)
    for name in names:
        operands[name] = ((), operands[name][1])
    rows = (call.shape[: len(call.shape) - reduced], call.arithmetic)
    attributes = call.attributes | {"reduced_rank": np.int64(reduced)}
    results = call.results | {"loss": rows}
    broken = replace(call, operands=operands, attributes=attributes, results=results)
    return broken, f"hess_and_grad needs a reduced_rank of 0, got {reduced}"


def reduced_rank(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    large = st.integers(len(call.shape) + 1, 2**63 - 1)
    wrong = draw(st.one_of(st.integers(-(2**63), -1), large))
    attributes = call.attributes | {"reduced_rank": np.int64(wrong)}
    return replace(call, attributes=attributes), f"reduced_rank must be .* got {wrong}"


def total_of_nothing(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    if call.target != "total":
        return None
    attributes = call.attributes | {"reduced_rank": np.int64(0)}
    call = replace(call, results={"loss": (call.shape, call.arithmetic)})
    return replace(call, attributes=attributes), "total needs a reduced_rank of at least 1, got 0"


def count(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    wrong = draw(st.integers(-(2**63), 0))
    attributes = call.attributes | {"count": np.int64(wrong)}
    return replace(call, attributes=attributes), f"count must be positive, got {wrong}"


def attribute(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """Missing, under another name, one more, or of another type: XLA itself refuses it."""
    name = draw(st.sampled_from([*call.attributes]))
    attributes = dict(call.attributes)
    kind = draw(st.sampled_from(["missing", "renamed", "more", "string", "narrow"]))
    if kind in ("missing", "renamed"):
        del attributes[name]
    if kind in ("renamed", "more"):
        attributes["other"] = np.int64(1)
    if kind in ("string", "narrow"):
        # A number that no right call has: JAX would take its program for that of an equal one.
        attributes[name] = "1" if kind == "string" else np.int32(-7)
    return replace(call, attributes=attributes), "[Aa]ttribute|[Ww]rong scalar data type"


def result_shape(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    """A float64 loss of everything may be longer than one; it is followed by zeros."""
    names = [n for n, (_, dtype) in call.results.items() if n != "loss" or dtype.itemsize < 8]
    if not names:
        return None
    name = draw(st.sampled_from(names))
    shape, dtype = call.results[name]
    wrong = (int(np.prod(shape)) + draw(st.integers(1, 4)),)
    results = call.results | {name: (wrong, dtype)}
    return replace(call, results=results), rf"{name} has {wrong[0]} elements instead of"


def result_dtype(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    name = draw(st.sampled_from([*call.results]))
    shape, _ = call.results[name]
    wide = call.arithmetic == oracle.FLOAT64
    wrong = [*oracle.INTEGERS, *(oracle.FLOATS[:3] if wide else [])]
    if name == "loss" and call.reduces:
        wrong += [oracle.FLOAT16, oracle.BFLOAT16]
    elif not wide:
        wrong.append(oracle.FLOAT64)
    results = call.results | {name: (shape, draw(st.sampled_from(wrong)))}
    return replace(call, results=results), f"{name} has an unsupported dtype"


def number_of_results(draw: st.DrawFn, call: Call) -> tuple[Call, str] | None:
    results = dict(call.results)
    if draw(st.booleans()):
        results["more"] = results[next(iter(results))]
        return replace(call, results=results), "a result too many"
    name, _ = results.popitem()
    return replace(call, results=results), f"the result {name} is missing"


BREAKS: tuple[Break, ...] = (
    other_rank,
    other_shape,
    foreign_dtype,
    other_dtype,
    factor_that_varies,
    number_of_operands,
    bits,
    half_a_focal_loss,
    floor_of_hessians,
    gamma_of_hessians,
    sum_of_hessians,
    reduced_rank,
    total_of_nothing,
    count,
    attribute,
    result_shape,
    result_dtype,
    number_of_results,
)


@pytest.fixture
def number(full: bool) -> int:
    return 1000 if full else sample.examples(100)


def drawn(number: int) -> Callable:
    return hypothesis.settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )


def test_what_is_wrong_is_refused(cpu: str, number: int, record: Callable) -> None:
    tried: Counter[str] = Counter()
    each = -(-number // len(BREAKS))

    @drawn(each)
    @hypothesis.given(st.data(), right_calls())
    def check(wrong: Break, data: st.DataObject, call: Call) -> None:
        broken = wrong(data.draw, call)
        hypothesis.assume(broken is not None)
        broken_call, words = broken
        with pytest.raises((RuntimeError, ValueError)) as error:
            broken_call.run()
        assert re.search(words, str(error.value)), (words, str(error.value))
        tried[wrong.__name__] += 1

    with jax.enable_x64(True):
        for wrong in BREAKS:
            check(wrong)
    assert all(tried[wrong.__name__] >= each for wrong in BREAKS)
    record("handlers", refused=tried.total(), kinds=len(tried))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_modifier_of_another_size_is_refused(
    cpu: str, name: str, dimension: int, size: int
) -> None:
    shape = [6, 6]
    shape[dimension] = size
    given = {"gamma", name} if name in FOCAL else {name}
    own = {n: tuple(shape) if n == name else () for n in NAMES if n in given}
    operands = {"logits": (6, 6), "labels": (6, 6), "scale": (), "smoothing": ()} | own
    dtypes = {"where": np.dtype(bool)}
    kind, results = "grad", ("gradient",)
    if name == "hess_floor":
        kind, results = "hess_and_grad", ("hessian", "gradient")
    call = Call(
        kind,
        {n: (form, dtypes.get(n, oracle.FLOAT32)) for n, form in operands.items()},
        dict.fromkeys(results, ((6, 6), oracle.FLOAT32)),
        {
            "modifiers": np.int64(sum(1 << NAMES.index(n) for n in given)),
            "reduced_rank": np.int64(0),
            "count": np.int64(1),
        },
        (6, 6),
        0,
    )
    with pytest.raises((RuntimeError, ValueError), match=f"{name} cannot be broadcast"):
        call.run()
    call.with_operand(name, (6, 6), None).run()


def test_what_is_right_is_evaluated(cpu: str, number: int, record: Callable) -> None:
    """Or most of the calls above would be refused for another reason."""
    accepted = 0

    @drawn(number // 5)
    @hypothesis.given(right_calls())
    def check(call: Call) -> None:
        nonlocal accepted
        results = dict(zip(call.results, call.run(), strict=True))
        assert all(np.isfinite(result.astype(np.float64)).all() for result in results.values())
        accepted += 1

    with jax.enable_x64(True):
        check()
    record("handlers, right calls", accepted=accepted)
