"""Calls outside of jit: one compiled call each, with the bits of a jitted one.

Nearly every other test makes eager calls as well, those of error messages among them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bce

pytestmark = pytest.mark.any_jax

SHAPE = (6, 20)
random = np.random.default_rng(5)
LOGITS = random.normal(size=SHAPE).astype(np.float32) * 9
LABELS = random.integers(0, 2, SHAPE).astype(np.int8)
ROW, COLUMN = random.random(SHAPE[0]).astype(np.float32), random.random(SHAPE[1])
WHERE = random.random(SHAPE) < 0.7

FUNCTIONS = {
    "loss": jax_bce.loss,
    "loss_and_grad": jax_bce.loss_and_grad,
    "focal_loss": jax_bce.focal_loss,
    "asymmetric_loss": jax_bce.asymmetric_loss,
    "loss_from_probs": lambda logits, *more, **options: jax_bce.loss_from_probs(
        jnp.abs(logits) / 90, *more, **options
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "where": {"where": WHERE},
    "weights": {"weight": COLUMN, "sample_weight": ROW, "reduction": "weighted_mean"},
    "axis": {"axis": 0, "normalizer": 3, "label_smoothing": 0.1},
    "ignore_label": {"ignore_label": 1, "dtype": jnp.bfloat16},
    "elements": {"reduction": "none", "where": WHERE[:, :1], "weight": 2},
}


def bits(results: Any) -> list[bytes]:
    return [np.asarray(result).tobytes() for result in jax.tree.leaves(results)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_has_the_bits_of_a_jitted_call(
    function: Callable[..., Any], options: dict[str, Any], implementation: str
) -> None:
    if function in (jax_bce.loss, jax_bce.loss_and_grad):
        options = options | {"implementation": implementation}
    static = {name for name in ("reduction", "axis", "dtype", "implementation") if name in options}
    jitted = jax.jit(function, static_argnames=static)  # arrays are operands, not constants
    assert bits(function(LOGITS, LABELS, **options)) == bits(jitted(LOGITS, LABELS, **options))


@pytest.mark.parametrize("pos_weight", [None, 3, COLUMN])
def test_grad_and_hess_has_the_bits_of_a_jitted_call(pos_weight: Any) -> None:
    jitted = jax.jit(lambda *o: jax_bce.grad_and_hess(*o, pos_weight=pos_weight, hess_floor=1e-3))
    eager = jax_bce.grad_and_hess(LOGITS, LABELS, pos_weight=pos_weight, hess_floor=1e-3)
    assert bits(eager) == bits(jitted(LOGITS, LABELS))


def test_lists_numbers_and_arrays_of_numpy_are_what_arrays_of_jax_are() -> None:
    expected = jax_bce.loss(jnp.asarray(LOGITS), jnp.asarray(LABELS), pos_weight=jnp.float32(2))
    for convert in (lambda a: a, lambda a: a.tolist(), lambda a: a.astype(np.float64)):
        assert bits(jax_bce.loss(convert(LOGITS), convert(LABELS), pos_weight=2)) == bits(expected)


@pytest.fixture
def traced() -> Iterator[list[str]]:
    """What JAX traces or compiles while the test runs."""
    found: list[str] = []

    def listen(event: str, _: float, **more: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append(f"{event} {more}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


CALLS: dict[str, Callable[[Any, float], Any]] = {
    "loss": lambda x, v: jax_bce.loss(
        x, LABELS, weight=v, pos_weight=1 + v, label_smoothing=v, normalizer=v
    ),
    "where": lambda x, v: jax_bce.loss(x, LABELS, where=WHERE, sample_weight=ROW * v),
    "loss_and_grad": lambda x, v: jax_bce.loss_and_grad(x, v, ignore_label=v / 2),
    "focal_loss": lambda x, v: jax_bce.focal_loss(x, LABELS, gamma=v, alpha=v),
    "asymmetric_loss": lambda x, v: jax_bce.asymmetric_loss(
        x, LABELS, gamma_neg=v, gamma_pos=v, clip=v / 2
    ),
    "loss_from_probs": lambda x, v: jax_bce.loss_from_probs(
        x, LABELS, epsilon=v / 9, log_epsilon=v
    ),
    "grad_and_hess": lambda x, v: jax_bce.grad_and_hess(x, LABELS, hess_floor=v),
}


@pytest.mark.parametrize("value", [0.25, 1, 1.0])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_new_values_compile_nothing(
    call: Callable[[Any, float], Any], value: float, traced: list[str]
) -> None:
    """Nor does an integer after a float."""
    jax.clear_caches()
    first = call(LOGITS, 0.5)
    assert traced
    traced.clear()
    second = call(LOGITS + 1, value)
    assert not traced
    assert bits(first) != bits(second)


def test_an_integer_that_float32_cannot_hold_is_not_rounded() -> None:
    one, two = (
        jax_bce.loss(jnp.full(1, -127.99), 1, reduction="sum", normalizer=normalizer)
        for normalizer in (2**24, 2**24 + 1)
    )
    assert bits(one) != bits(two)


def test_a_call_that_is_refused_compiles_nothing(traced: list[str]) -> None:
    for options in (
        {"label_smoothing": 2.0},
        {"where": WHERE[:, :3]},
        {"sample_weight": COLUMN},
        {"ignore_label": 300},
        {"normalizer": ROW},
        {"reduction": "batchmean"},
    ):
        with pytest.raises(ValueError, match=r"must|fit|cannot"):
            jax_bce.loss(LOGITS + 1, LABELS, **options)
    with pytest.raises(ValueError, match="gamma"):
        jax_bce.focal_loss(LOGITS, LABELS, gamma=-1)
    assert not traced


def test_is_one_compiled_call(traced: list[str]) -> None:
    """Not one for each constant, conversion and step."""
    shape = (3, 7, 5)  # of no other test
    jax_bce.loss(np.ones(shape, np.float32), np.ones(shape), where=np.ones(shape, bool), axis=1)
    compiled = [event for event in traced if "backend_compile" in event]
    assert len(compiled) == 1


@pytest.mark.parametrize("changed", ["logits", "weight"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "grad_and_hess"])
def test_an_array_of_numpy_may_be_changed_after_the_call(name: str, changed: str) -> None:
    """jit may read it later, and in place if it is aligned."""
    function = getattr(jax_bce, name)
    if name == "grad_and_hess" and changed == "weight":
        changed = "pos_weight"  # it has no weight
    size = 2**20
    memory = np.empty(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4 * size].view(np.float32)
    array[:] = 0.5

    def call(array: Any) -> Any:
        if changed == "logits":
            return function(array, 1)
        return function(np.full(size, 0.25, np.float32), 1, **{changed: array})

    expected = bits(call(jnp.array(array)))
    result = call(array)
    array[:] = 0.125
    assert bits(result) == expected


def test_where_jit_is_switched_off() -> None:
    expected = jax_bce.loss(LOGITS, LABELS, where=WHERE)
    with jax.disable_jit():
        assert bits(jax_bce.loss(LOGITS, LABELS, where=WHERE)) == bits(expected)
