"""jax_bce.optax and jax_bce.torch_like: shapes, dtypes, denominators and errors as their peers have
them, and results that are those of the functions they call, bit for bit.

tests/conformance compares them with the peers themselves.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
from oracle import BFLOAT16, FLOAT16

import jax_bce
from jax_bce import optax, torch_like

LOGITS = np.array([[-20.0, -1.5, 0.0], [0.25, 3.0, 20.0]], np.float32)
LABELS = np.array([[0, 1, 1], [0, 1, 0]], np.uint8)
WEIGHT = np.array([[2.0], [0.5]], np.float32)
POS_WEIGHT = np.array([1.0, 3.0, 0.25], np.float32)
PROBS = np.array([[2e-5, 0.125, 0.5], [0.75, 0.9375, 0.96875]], np.float32)

OPTAX = [optax.sigmoid_binary_cross_entropy, optax.sigmoid_focal_loss]
TORCH = [torch_like.binary_cross_entropy_with_logits, torch_like.sigmoid_focal_loss]
FROM_PROBS = torch_like.binary_cross_entropy


def name_of(function: Callable) -> str:
    return f"{function.__module__}.{function.__name__}".removeprefix("jax_bce.")


pytestmark = [pytest.mark.any_jax, pytest.mark.quickly]

every = pytest.mark.parametrize("function", OPTAX + TORCH, ids=name_of)
of_optax = pytest.mark.parametrize("function", OPTAX, ids=name_of)
of_torch = pytest.mark.parametrize("function", TORCH, ids=name_of)
all_of_torch = pytest.mark.parametrize("function", [*TORCH, FROM_PROBS], ids=name_of)


def elementwise(function: Callable) -> Callable:
    return partial(function, reduction="none") if function in TORCH else function


def test_peers_are_not_imported() -> None:
    code = (
        "import sys\n"
        "from jax_bce import optax, torch_like\n"
        "assert not {'optax', 'torch', 'torchvision', 'keras'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, cwd="/", env=platforms.environment("cpu"), check=True)


# A call with its arguments in the peer's order, and the one that it is.
SAME = [
    (OPTAX[0], (), {}, jax_bce.loss, {"reduction": "none"}),
    (OPTAX[1], (), {}, jax_bce.focal_loss, {"gamma": 2.0, "reduction": "none"}),
    (
        *(OPTAX[1], (), {"alpha": 0.75, "gamma": 1.5}),
        *(jax_bce.focal_loss, {"alpha": 0.75, "gamma": 1.5, "reduction": "none"}),
    ),
    (TORCH[0], (), {}, jax_bce.loss, {"reduction": "mean"}),
    (
        *(TORCH[0], (WEIGHT, "sum", POS_WEIGHT), {}),
        *(jax_bce.loss, {"weight": WEIGHT, "reduction": "sum", "pos_weight": POS_WEIGHT}),
    ),
    (TORCH[1], (), {}, jax_bce.focal_loss, {"alpha": 0.25, "gamma": 2.0, "reduction": "none"}),
    (TORCH[1], (0.75, 1.5, "mean"), {}, jax_bce.focal_loss, {"alpha": 0.75, "gamma": 1.5}),
    (TORCH[1], (-1, 0, "sum"), {}, jax_bce.loss, {"reduction": "sum"}),
]


@pytest.mark.parametrize(("function", "positional", "named", "behind", "keywords"), SAME)
def test_one_call_of_the_function_behind(
    platform: str,
    function: Callable,
    positional: tuple,
    named: dict,
    behind: Callable,
    keywords: dict,
) -> None:
    actual = function(LOGITS, LABELS, *positional, **named)
    oracle.assert_same_bits(actual, behind(LOGITS, LABELS, **keywords))


@every
def test_dtype_of_the_result(platform: str, function: Callable, dtype: np.dtype) -> None:
    """The logits', whatever that of the labels."""
    for labels in (LABELS, LABELS.astype(np.float32), LABELS.astype(bool)):
        assert elementwise(function)(LOGITS.astype(dtype), labels).dtype == dtype


@of_torch
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dtype_of_a_reduced_loss(
    platform: str, function: Callable, dtype: np.dtype, reduction: str
) -> None:
    """PyTorch's: the sum itself is wider, and rounded once."""
    logits = LOGITS.astype(dtype)
    loss = function(logits, LABELS, reduction=reduction)
    wide = function(logits.astype(oracle.arithmetic_dtype(dtype)), LABELS, reduction=reduction)
    oracle.assert_same_bits(loss, wide.astype(dtype))


SHAPES = [
    ((2, 3), (3,)),
    ((3,), (2, 3)),
    ((2, 1), (3,)),
    ((2, 1), (1, 3)),
    ((), (3,)),
    ((0,), (1,)),
]


@of_optax
@pytest.mark.parametrize(("logits_shape", "labels_shape"), SHAPES, ids=str)
def test_optax_broadcasts(
    platform: str, function: Callable, logits_shape: tuple, labels_shape: tuple
) -> None:
    logits = np.linspace(-3, 5, int(np.prod(logits_shape)), dtype=np.float32).reshape(logits_shape)
    labels = np.arange(np.prod(labels_shape), dtype=np.int32).reshape(labels_shape) % 2
    shape = np.broadcast_shapes(logits_shape, labels_shape)
    loss, pull = jax.vjp(lambda x: function(x, labels), logits)
    assert loss.shape == shape
    oracle.assert_same_bits(
        loss, function(np.broadcast_to(logits, shape), np.broadcast_to(labels, shape))
    )
    assert pull(jnp.ones_like(loss))[0].shape == logits_shape


@of_optax
def test_one_label_for_all(platform: str, function: Callable) -> None:
    oracle.assert_same_bits(function(LOGITS, 1), function(LOGITS, np.ones_like(LOGITS)))


def test_one_label_for_all_is_read_in_place() -> None:
    """Nothing of the logits' shape is formed but the losses."""
    program = jax.make_jaxpr(optax.sigmoid_binary_cross_entropy)(LOGITS, np.float32(1))
    formed = [v.aval.shape for equation in program.eqns for v in equation.outvars]
    assert formed.count(LOGITS.shape) == 1


@of_optax
def test_shapes_that_do_not_broadcast(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2,\)"):
        function(LOGITS, LABELS[:, 0])


@all_of_torch
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (6,), (3, 2)], ids=str)
def test_target_of_another_shape(function: Callable, shape: tuple[int, ...]) -> None:
    """Not even a scalar, which `jax_bce.loss` takes."""
    names = "targets.*inputs" if function is torch_like.sigmoid_focal_loss else "target.*input"
    with pytest.raises(ValueError, match=names) as error:
        function(LOGITS, np.zeros(shape, np.float32))
    assert str(shape) in str(error.value)
    assert str(LOGITS.shape) in str(error.value)


@pytest.mark.parametrize(
    ("shape", "target", "fix"),
    [
        ((4, 1), np.zeros(4), "target.reshape(input.shape)"),
        ((4,), np.zeros((4, 1)), "target.reshape(input.shape)"),
        ((2, 3), np.zeros(()), "jnp.broadcast_to(target, input.shape)"),
        ((2, 3), np.zeros(3), "jnp.broadcast_to(target, input.shape)"),
        ((2, 3), np.zeros(2), "jnp.broadcast_to(target[:, None], input.shape)"),
        ((2, 3), np.zeros(2, int), "jax.nn.one_hot(target, 3)"),
        ((2, 3), np.zeros((3, 2)), "jnp.transpose(target, (1, 0))"),
        ((2, 3), np.zeros(6), "target.reshape(input.shape)"),
        ((2, 3), [0.0] * 6, "jnp.asarray(target).reshape(input.shape)"),
        ((2, 3), np.zeros(4), None),
    ],
    ids=str,
)
def test_a_target_of_another_shape_is_told_what_works(
    shape: tuple, target: np.ndarray, fix: str | None
) -> None:
    """And nothing else."""
    logits = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="does not match") as error:
        TORCH[0](logits, target)
    hint = str(error.value).removesuffix(".").partition(": ")[2]
    codes = re.findall(r"(?:jnp|jax|target)\.[^;]*\)", hint)
    assert (fix in codes) if fix else (codes == [])
    for code in codes:
        fixed = eval(code, {"jnp": jnp, "jax": jax, "target": target, "input": logits})
        jax.eval_shape(TORCH[0], logits, fixed)


@pytest.mark.parametrize("create", [torch_like.BCEWithLogitsLoss, torch_like.BCELoss])
@pytest.mark.parametrize("number", [np.asarray, jnp.asarray, np.ndarray.tolist])
def test_a_batch_is_no_option(create: Callable, number: Callable) -> None:
    """torch.nn's classes are constructed first; a batch is neither compared nor printed."""
    with pytest.raises(TypeError) as error:
        create(number(LOGITS), number(LABELS))
    name = create.__name__
    assert str(error.value).endswith(f"{name}()(input, target).")
    assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    "call",
    [
        *(partial(function, LOGITS, LABELS) for function in TORCH),
        partial(FROM_PROBS, PROBS, LABELS),
        torch_like.BCEWithLogitsLoss,
        torch_like.BCELoss,
    ],
)
@pytest.mark.parametrize("reduction", ["weighted_mean", "batchmean", "", None])
def test_reductions_are_those_of_pytorch(call: Callable, reduction: object) -> None:
    """Others are refused, also those that `jax_bce.loss` has, and only PyTorch's are offered."""
    with pytest.raises(ValueError, match=r"reduction must be one of \['none', 'mean', 'sum'\]"):
        call(reduction=reduction)


# What is wrong, as arguments of each function.
WRONG = {
    "integers": ((LOGITS.astype(int), LABELS), {}),
    "complex labels": ((LOGITS, LABELS.astype(complex)), {}),
    "shapes": ((LOGITS, LABELS[0]), {}),
    "weight of a sample": ((LOGITS, LABELS), {"weight": WEIGHT[:, 0]}),
    "weight of nothing": ((LOGITS, LABELS), {"weight": np.ones(4)}),
    "pos_weight": ((LOGITS, LABELS), {"pos_weight": np.ones((5, 2, 3))}),
}


@pytest.mark.parametrize(
    ("function", "case"),
    [
        (function, case)
        for function in [*TORCH, FROM_PROBS]
        for case, (_, options) in WRONG.items()
        if options.keys() <= inspect.signature(function).parameters.keys()
    ],
)
def test_errors_name_the_arguments_of_the_function(function: Callable, case: str) -> None:
    """And none that it does not have."""
    arguments, options = WRONG[case]
    with pytest.raises((TypeError, ValueError)) as error:
        function(*arguments, **options)
    words = set(re.findall(r"\w+", str(error.value)))
    assert words & set(inspect.signature(function).parameters)
    assert not words & {"logits", "labels", "probs", "sample_weight", "where", "ignore_label"}


@pytest.mark.parametrize(
    ("create", "function"),
    [
        (torch_like.BCEWithLogitsLoss, TORCH[0]),
        (torch_like.BCELoss, FROM_PROBS),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_objects(platform: str, create: Callable, function: Callable, reduction: str) -> None:
    """They call the function with what they were made of, compiled or not."""
    inputs = PROBS if function is FROM_PROBS else LOGITS
    options = {"weight": WEIGHT, "reduction": reduction}
    options |= {} if function is FROM_PROBS else {"pos_weight": POS_WEIGHT}
    criterion, expected = create(**options), partial(function, **options)
    oracle.assert_same_bits(criterion(inputs, LABELS), expected(inputs, LABELS))
    oracle.assert_same_bits(jax.jit(criterion)(inputs, LABELS), jax.jit(expected)(inputs, LABELS))
    oracle.assert_same_bits(create()(inputs, LABELS), function(inputs, LABELS))


def test_probabilities(platform: str, dtype: np.dtype) -> None:
    """Those of `loss_from_probs`, in the input's dtype, and over PyTorch's denominators."""
    probs, wide = PROBS.astype(dtype), oracle.arithmetic_dtype(dtype)
    options = {"weight": WEIGHT, "reduction": "none"}
    losses = jax_bce.loss_from_probs(probs, LABELS, dtype=wide, **options)
    total = jnp.sum(losses)
    for reduction, expected in {"none": losses, "sum": total, "mean": total / 6}.items():
        actual = FROM_PROBS(probs, LABELS, WEIGHT, reduction)
        oracle.assert_same_bits(actual, expected.astype(dtype))


def test_logarithms_are_clamped_as_in_pytorch(platform: str, dtype: np.dtype) -> None:
    """Beside another element, with a weight, and with a sigmoid in front: nothing is NaN."""
    p, y = np.array([0, 0, 0, 1, 1, 1, 0.5], dtype), np.array([1, 0.25, 0, 0, 0.75, 1, 1], dtype)
    weight = np.array([2] * 6 + [0], dtype)

    @jax.jit
    def values(p: jax.Array, y: jax.Array, weight: jax.Array) -> tuple:
        loss, pull = jax.vjp(partial(FROM_PROBS, reduction="none"), p, y, weight)
        in_logit = jax.grad(lambda x: FROM_PROBS(jax.nn.sigmoid(x), y))(jnp.log(p / (1 - p)))
        return loss, *pull(jnp.ones_like(loss)), in_logit

    loss, in_p, in_y, in_weight, in_logit = (value[:6] for value in values(p, y, weight))
    oracle.assert_same_bits(loss, np.array([200, 50, 0, 200, 50, 0], dtype))
    oracle.assert_same_bits(in_weight, np.array([100, 25, 0, 100, 25, 0], dtype))
    oracle.assert_same_bits(in_y, np.array([200] * 3 + [-200] * 3, dtype))
    assert not np.any(in_p)
    assert not np.any(in_logit)


def test_probabilities_of_float64_are_clamped_too() -> None:
    """Down to exp(-100) logarithms are exact; the smallest float64 has one of -745."""
    with jax.enable_x64(True):
        p = np.array([1e-43, 1e-300, 5e-324])
        losses = FROM_PROBS(p, np.ones(3), reduction="none")
        np.testing.assert_allclose(losses, [-np.log(1e-43), 100, 100], rtol=oracle.SURROUNDINGS)


def test_a_probability_that_is_nan() -> None:
    assert np.isnan(FROM_PROBS(np.float32([np.nan, 0.5]), np.ones(2, np.float32)))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2, 3), (5, 2, 3)], ids=str)
def test_weight_that_does_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    """Nor may it make the loss larger than the input, which is an error in PyTorch, too."""
    with pytest.raises(ValueError, match=name):
        torch_like.binary_cross_entropy_with_logits(LOGITS, LABELS, **{name: np.ones(shape)})


@every
def test_logits_that_are_no_floats(function: Callable) -> None:
    name = next(iter(inspect.signature(function).parameters))
    with pytest.raises(TypeError, match=rf"^{name} .*int32.* {name}\.astype"):
        function(LOGITS.astype(np.int32), LABELS)


def test_deprecated_arguments_of_pytorch() -> None:
    """By position they cannot be taken for others without an error."""
    function = torch_like.binary_cross_entropy_with_logits
    with pytest.raises(TypeError, match="size_average"):
        function(LOGITS, LABELS, size_average=True)
    with pytest.raises(ValueError, match="reduction"):
        function(LOGITS, LABELS, None, True)
    with pytest.raises(TypeError, match="positional"):
        function(LOGITS, LABELS, None, None, None, "mean")


@all_of_torch
def test_mean_of_nothing(platform: str, function: Callable) -> None:
    nothing = np.zeros((0, 3), np.float32)
    loss, gradient = jax.value_and_grad(partial(function, reduction="mean"))(nothing, nothing)
    assert loss == 0
    assert gradient.shape == (0, 3)


def test_mean_is_over_elements_whatever_their_weight(platform: str) -> None:
    function = torch_like.binary_cross_entropy_with_logits
    ones = np.ones_like(LABELS)
    oracle.assert_same_bits(
        function(LOGITS, ones, weight=np.float32(2)), 2 * function(LOGITS, ones)
    )
    oracle.assert_same_bits(
        function(LOGITS, ones, pos_weight=np.float32(2)), 2 * function(LOGITS, ones)
    )


def test_alpha_below_zero_weights_neither_class(platform: str) -> None:
    function = torch_like.sigmoid_focal_loss
    neither = jax_bce.focal_loss(LOGITS, LABELS, reduction="none")
    for alpha in (-1, -0.5, np.float32(-1), jnp.float32(-1)):
        oracle.assert_same_bits(function(LOGITS, LABELS, alpha), neither)
    for alpha in (0, 0.0):  # the positive class weighs nothing
        assert not np.asarray(function(LOGITS, LABELS, alpha))[LABELS == 1].any()


def test_traced_numbers_compile_once(platform: str) -> None:
    traced = []

    @jax.jit
    def loss(alpha: jax.Array, gamma: jax.Array) -> jax.Array:
        traced.append(None)
        return torch_like.sigmoid_focal_loss(LOGITS, LABELS, alpha, gamma)

    for alpha, gamma in ((0.25, 2.0), (0.75, 1.0)):
        expected = jax_bce.focal_loss(LOGITS, LABELS, alpha=alpha, gamma=gamma, reduction="none")
        np.testing.assert_allclose(loss(alpha, gamma), expected, rtol=oracle.SURROUNDINGS)
    assert len(traced) == 1


@every
def test_transformations(platform: str, function: Callable) -> None:
    """jit, vmap and grad, all at once, are rows one by one."""

    def of_row(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(elementwise(function)(x, y))

    gradient = jax.jit(jax.vmap(jax.grad(of_row)))(LOGITS, LABELS)
    rows = [jax.grad(of_row)(x, y) for x, y in zip(LOGITS, LABELS, strict=True)]
    np.testing.assert_allclose(gradient, np.stack(rows), rtol=oracle.SURROUNDINGS)


@every
def test_lists_and_numbers(platform: str, function: Callable) -> None:
    oracle.assert_same_bits(function(LOGITS.tolist(), LABELS.tolist()), function(LOGITS, LABELS))
    assert function(0.0, 1).shape == ()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_labels_are_not_rounded(platform: str, dtype: np.dtype) -> None:
    """0.999 has digits that 16 bits have not: the loss at logit 100 is 0.1."""
    logits, labels = np.full(4, 100, dtype), np.full(4, 0.999, np.float32)
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    oracle.assert_same_bits(losses, oracle.round_to(oracle.exact(logits, labels).loss, dtype))
