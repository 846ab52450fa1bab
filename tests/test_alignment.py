"""Operands whose axes are not where they are looked for: every fix that a message prints works.

Each is evaluated, accepted, and means what it says: the axes of the logits that it names.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sample
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import jax_bce
from jax_bce import _arguments, _evaluate

pytestmark = pytest.mark.any_jax

# What a message names: the axes of the logits, and the expression.
READING = re.compile(r"(as one number|for ax[ei]s ([\d, and]+)(?: of the \w+)?), ([^;]+)")
FUNCTIONS = {
    "weight": "loss",
    "sample_weight": "loss",
    "pos_weight": "loss",
    "where": "loss",
    "alpha": "focal_loss",
    "gamma": "focal_loss",
    "gamma_neg": "asymmetric_loss",
    "gamma_pos": "asymmetric_loss",
    "clip": "asymmetric_loss",
    "epsilon": "loss_from_probs",
    "log_epsilon": "loss_from_probs",
    "hess_floor": "grad_and_hess",
}
# NumPy's functions in place of jnp's, which would compile for each shape.
SCOPE = {"jnp": np, "jax": jax}


def call(name: str, shape: tuple, **keywords: object) -> object:
    """A call that is traced: it checks all that it is told, and computes nothing."""
    zeros = np.zeros(shape, np.float32)
    labels = keywords.pop("labels", 0)
    return jax.eval_shape(lambda: getattr(jax_bce, name)(zeros, labels, **keywords))


def seen(function: str, shape: tuple, name: str, operand: np.ndarray) -> np.ndarray:
    """The operand of each element, as the package takes it."""
    zeros = np.zeros(shape, np.float32)
    common = name in ("weight", "sample_weight", "pos_weight", "where")
    own = {name: operand} if common else {}
    of = "probs" if function == "loss_from_probs" else "logits"
    numbers = {} if common else {name: operand}
    checked = _arguments.checked(zeros, zeros, reduction="none", name=of, numbers=numbers, **own)

    def taken(call: _evaluate.Call) -> jax.Array:
        return call.operands[-1] if name in call.params["modifiers"] else call.number(name)

    return np.broadcast_to(_evaluate.evaluate(taken, checked), shape)


def message_of(call: Callable) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def readings(message: str) -> dict[tuple[int, ...], str]:
    """The expression for each choice of axes, the last of which ends with the message."""
    found = READING.findall(message.removesuffix(".").partition(": ")[2])
    return {tuple(map(int, re.findall(r"\d+", axes))): code for _, axes, code in found}


def aligned(operand: np.ndarray, axes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The operand of the logits' shape whose axes, but those of size 1, are at these of theirs."""
    at = dict(zip(axes, (size for size in operand.shape if size != 1), strict=True))
    return np.broadcast_to(operand.reshape([at.get(a, 1) for a in range(len(shape))]), shape)


@st.composite
def misaligned(draw: st.DrawFn, names: tuple[str, ...]) -> tuple:
    """Logits' shape, an operand's name and shape, and the axes of the logits that it has."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    wide = [a for a, size in enumerate(shape) if size > 1]
    axes = tuple(sorted(draw(st.sets(st.sampled_from(wide)) if wide else st.just(set()))))
    own = [shape[a] for a in axes]
    for at in draw(st.lists(st.integers(0, len(own)), max_size=2)):
        own.insert(at, 1)
    return shape, draw(st.sampled_from(names)), tuple(own), axes


def operand_of(name: str, own: tuple[int, ...]) -> np.ndarray:
    numbers = np.arange(int(np.prod(own)), dtype=np.float32).reshape(own)
    return numbers % 3 != 1 if name == "where" else (numbers + 1) / 128


@settings(max_examples=sample.examples(50), deadline=None, derandomize=True, database=None)
@given(misaligned(tuple(FUNCTIONS)))
@example(((2, 2, 3, 3), "where", (2, 3, 3), (0, 2, 3)))
@example(((2, 2, 3, 3), "where", (2, 3, 3), (1, 2, 3)))
@example(((2, 3, 2, 2), "where", (3,), (1,)))
@example(((2, 3, 4, 4), "weight", (3,), (1,)))
@example(((4, 3, 4), "sample_weight", (3, 4), (1, 2)))
@example(((3, 3, 2), "alpha", (3,), (0,)))
def test_the_fix_means_the_axes_that_it_names(case: tuple) -> None:
    shape, name, own, axes = case
    operand, function = operand_of(name, own), FUNCTIONS[name]
    message = message_of(lambda: call(function, shape, **{name: operand}))
    assume(message is not None)
    assert str(own) in message
    assert str(shape) in message
    fixes = readings(message)
    assert axes in fixes
    for named, code in fixes.items():
        key, expression = name, code
        if name == "sample_weight":
            key, _, expression = code.partition("=")
            assert key == "weight"
        fixed = eval(expression, SCOPE | {name: operand})
        full = aligned(operand, named, shape)
        oracle.assert_same_bits(np.broadcast_to(fixed, shape), full)
        call(function, shape, **{key: fixed})
        oracle.assert_same_bits(seen(function, shape, key, fixed), full)


@settings(max_examples=sample.examples(30), deadline=None, derandomize=True, database=None)
@given(misaligned(("labels",)), st.booleans())
@example(((2, 2, 3, 3), "labels", (2, 3, 3), (0, 2, 3)), False)
@example(((2, 1, 3), "labels", (2, 3, 1), (0, 2)), True)
def test_labels_for_several_logits_name_the_axes(case: tuple, integers: bool) -> None:
    shape, _, own, axes = case
    labels = operand_of("labels", own)
    labels = (labels * 128).astype(np.int32) if integers else labels
    message = message_of(lambda: call("loss", shape, labels=labels))
    assume(message is not None)
    scope = SCOPE | {"labels": labels, "logits": np.zeros(shape, np.float32)}
    if "reshape" in message:
        fixed = eval(re.search(r"labels\.reshape\(logits\.shape\)", message)[0], scope)
        oracle.assert_same_bits(fixed, aligned(labels, axes, shape))
        return
    fixes = readings(message)
    assert axes in fixes
    for named, code in fixes.items():
        fixed = eval(code.partition(" to move")[0], scope)
        oracle.assert_same_bits(np.asarray(fixed), aligned(labels, named, shape))
        call("loss", shape, labels=fixed)


@settings(max_examples=sample.examples(30), deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data(), st.booleans())
def test_class_indices_name_the_axis_of_the_classes(
    sizes: list[int], data: st.DataObject, kept: bool
) -> None:
    """Also where the classes come first, and where their axis is kept with size 1."""
    shape = tuple(sizes)
    axis = data.draw(st.integers(0, len(shape) - 1))
    own = shape[:axis] + (1,) * kept + shape[axis + 1 :]
    classes = shape[axis]
    labels = (np.arange(int(np.prod(own))).reshape(own) % classes).astype(np.int32)
    message = message_of(lambda: call("loss", shape, labels=labels))
    assume(message is not None and "reshape" not in message)
    codes = re.findall(r"jax\.nn\.one_hot\(labels[^()]*\)", message)
    every = [np.asarray(eval(code, SCOPE | {"labels": labels})) for code in codes]
    indices = labels.reshape(shape[:axis] + shape[axis + 1 :])
    exact = np.moveaxis(np.eye(classes, dtype=np.float32)[indices], -1, axis)
    assert any(one.shape == shape and np.array_equal(one, exact) for one in every)
    for one in every:
        assert one.shape == shape
        call("loss", shape, labels=one)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_what_is_no_index_is_not_taken_for_one(dtype: type) -> None:
    message = message_of(lambda: call("loss", (4, 3), labels=np.zeros(4, dtype)))
    assert "one_hot" not in message
    assert "jnp.broadcast_to(labels[:, None], logits.shape)" in message


def test_channels_last_labels_are_told_to_move_their_axes() -> None:
    labels = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3) % 2
    message = message_of(lambda: call("loss", (2, 3, 4, 5), labels=labels))
    (code,) = re.findall(r"jnp\.transpose\(labels, \([\d, ]+\)\)", message)
    fixed = eval(code, SCOPE | {"labels": labels})
    oracle.assert_same_bits(fixed, np.moveaxis(labels, -1, 1))
    square = message_of(lambda: call("loss", (2, 3, 4, 4), labels=np.zeros((2, 4, 4, 3), int)))
    assert re.findall(r"\([\d, ]{10}\)", square.partition(": ")[2]) == [
        "(0, 3, 1, 2)",
        "(0, 3, 2, 1)",
    ]


@settings(max_examples=sample.examples(30), deadline=None, derandomize=True, database=None)
@given(misaligned(("normalizer",)), st.data())
def test_the_fix_of_a_normalizer(case: tuple, data: st.DataObject) -> None:
    """Its axes are those of the result."""
    kept, name, own, axes = case
    shape = (*kept, 3)
    normalizer = operand_of(name, own)
    options = {"axis": -1, "reduction": "sum"}
    message = message_of(lambda: call("loss", shape, normalizer=normalizer, **options))
    assume(message is not None)
    fixes = readings(message)
    assert axes in fixes
    for named, code in fixes.items():
        fixed = eval(code, SCOPE | {"normalizer": normalizer})
        full = aligned(normalizer, named, kept)
        oracle.assert_same_bits(np.asarray(fixed), full)
        call("loss", shape, normalizer=fixed, **options)


@pytest.mark.parametrize(
    ("name", "own", "expression"),
    [
        ("where", (2, 4, 5), "where[:, None]"),
        ("where", (3,), "where[None, :, None, None]"),
        ("weight", (2, 4, 5), "weight[:, None]"),
        ("weight", (3,), "weight[:, None, None]"),
        ("pos_weight", (3,), "pos_weight[:, None, None]"),
        ("sample_weight", (2, 4, 5), "weight=sample_weight[:, None]"),
        ("sample_weight", (3,), "weight=sample_weight[:, None, None]"),
        ("weight", (2, 1, 1, 1, 1), "weight[:, :, :, :, 0]"),
    ],
)
def test_images(check, name: str, own: tuple, expression: str) -> None:
    """Channels come second, as in PyTorch."""
    shape, operand = (2, 3, 4, 5), operand_of(name, own)
    message = message_of(lambda: call("loss", shape, **{name: operand}))
    assert message.endswith(f", {expression}.")
    key, _, code = ("=" + expression if "=" not in expression else expression).partition("=")
    (axes,) = readings(message)
    logits = oracle.random_logits(np.float32, shape, 3)
    fixed, full = eval(code, {name: jnp.asarray(operand)}), aligned(operand, axes, shape)
    exact = oracle.exact(logits, 1, pos_weight=full if name == "pos_weight" else 1.0).loss
    exact = exact if name == "pos_weight" else np.where(full, exact * full, 0)
    loss = jax_bce.loss(logits, 1, reduction="sum", axis=(0, 3), **{key or name: fixed})
    check.reduced("xla", loss, exact.sum(axis=(0, 3)))


def test_a_list_is_told_to_become_an_array() -> None:
    message = message_of(lambda: call("loss", (2, 3), weight=[1.0, 2.0]))
    assert message.endswith("jnp.asarray(weight)[:, None].")
