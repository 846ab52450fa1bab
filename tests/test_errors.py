"""A wrong call raises at once: TypeError or ValueError with both values and how to mend it.

Under jit as well as outside, from both public functions.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bce

LOGITS, LABELS = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.int32)


@pytest.fixture(params=["loss", "loss_and_grad"])
def function(request: pytest.FixtureRequest) -> Callable:
    return getattr(jax_bce, request.param)


@pytest.fixture(params=["eager", "jit"])
def call(request: pytest.FixtureRequest, function: Callable) -> Callable:
    """Calls with logits and labels as arrays or, under jit, as tracers."""

    def traced(logits, labels, **keywords):
        return jax.jit(lambda x, y: function(x, y, **keywords))(logits, labels)

    return function if request.param == "eager" else traced


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8", "complex64"])
def test_dtype_of_logits(call: Callable, dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"logits.*{dtype}"):
        call(LOGITS.astype(dtype), LABELS)


def test_python_int_as_logits(function: Callable) -> None:
    with pytest.raises(TypeError, match="logits"):
        function(1, 0)


@pytest.mark.parametrize("dtype", ["complex64", "uint32"])
def test_dtype_of_labels(call: Callable, dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"labels.*{dtype}"):
        call(LOGITS, LABELS.astype(dtype))


def test_float8_logits(call: Callable) -> None:
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        call(jnp.zeros(3, jnp.float8_e4m3fn), LABELS[0])


@pytest.mark.parametrize(
    ("logits_shape", "labels_shape"),
    [((5, 1), (5,)), ((5,), (5, 1)), ((4, 3), (3,)), ((4, 3), (4,)), ((3,), (4, 3)), ((), (1,))],
    ids=str,
)
def test_shapes(call: Callable, logits_shape, labels_shape) -> None:
    """No silent broadcast: (n, 1) against (n,) would be an n by n loss."""
    with pytest.raises(ValueError, match="shape") as error:
        call(np.zeros(logits_shape, np.float32), np.zeros(labels_shape, np.float32))
    message = str(error.value)
    assert str(logits_shape) in message
    assert str(labels_shape) in message


def test_shapes_that_differ_by_ones_are_told_to_reshape(function: Callable) -> None:
    with pytest.raises(ValueError, match="reshape"):
        function(np.zeros((5, 1), np.float32), np.zeros(5, np.float32))


@pytest.mark.parametrize("name", ["reduction", "implementation"])
@pytest.mark.parametrize("value", ["average", "", 1])
def test_unknown_option(call: Callable, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        call(LOGITS, LABELS, **{name: value})
    assert repr(value) in str(error.value)
    assert {"reduction": "'none'", "implementation": "'xla'"}[name] in str(error.value)


def test_unknown_residuals() -> None:
    with pytest.raises(ValueError, match="residuals") as error:
        jax_bce.loss(LOGITS, LABELS, residuals="all")
    assert "'all'" in str(error.value)
    assert "'recompute'" in str(error.value)


@pytest.mark.parametrize("axis", [2, -3, (0, 2), [5]], ids=str)
def test_axis_out_of_range(call: Callable, axis) -> None:
    with pytest.raises(ValueError, match="axis") as error:
        call(LOGITS, LABELS, axis=axis)
    assert str(axis if isinstance(axis, int) else axis[-1]) in str(error.value)
    assert str(LOGITS.shape) in str(error.value)


@pytest.mark.parametrize("axis", [(0, 0), (1, -1), [0, 1, 0]], ids=str)
def test_axis_twice(call: Callable, axis) -> None:
    with pytest.raises(ValueError, match="axis") as error:
        call(LOGITS, LABELS, axis=axis)
    assert str(tuple(axis)) in str(error.value)


@pytest.mark.parametrize("axis", [1.0, "0", (0, 1.5)], ids=str)
def test_axis_is_no_integer(function: Callable, axis) -> None:
    with pytest.raises(TypeError):
        function(LOGITS, LABELS, axis=axis)


def test_axis_of_rank_0(function: Callable) -> None:
    with pytest.raises(ValueError, match="axis"):
        function(np.float32(1), 1, axis=0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan"), float("inf"), 2])
def test_label_smoothing_outside_0_to_1(call: Callable, smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing") as error:
        call(LOGITS, LABELS, label_smoothing=smoothing)
    assert str(smoothing) in str(error.value)


@pytest.mark.parametrize("smoothing", [np.float32(1.5), np.float64(-0.25), np.array(7.0)])
def test_label_smoothing_from_numpy(function: Callable, smoothing: np.ndarray) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        function(LOGITS, LABELS, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_dtype_of_the_result(function: Callable, dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"dtype.*{dtype}"):
        function(LOGITS, LABELS, dtype=dtype)


def test_missing_cuda_kernel(call: Callable) -> None:
    """With the reason and the remedy; never a silent fall-back from what was asked for."""
    try:
        from jax_bce import _primitive

        missing = _primitive.missing("cuda")
    except (ImportError, AttributeError):
        missing = "the package cannot say"
    if missing is None:
        pytest.skip("there is a CUDA kernel")
    with pytest.raises(RuntimeError, match="implementation='cuda'") as error:
        call(LOGITS, LABELS, implementation="cuda")
    assert missing in str(error.value)
    assert "implementation=None" in str(error.value)


@pytest.mark.parametrize("positional", [("mean",), ("mean", None), (None, None, "mean")], ids=len)
def test_options_are_keywords(function: Callable, positional: tuple) -> None:
    with pytest.raises(TypeError, match="positional"):
        function(LOGITS, LABELS, *positional)


def test_signatures_are_the_same_but_for_residuals() -> None:
    loss, both = (inspect.signature(f).parameters for f in (jax_bce.loss, jax_bce.loss_and_grad))
    assert {k: v.default for k, v in loss.items() if k != "residuals"} == {
        k: v.default for k, v in both.items()
    }
    assert loss["residuals"].default == "gradient"


def test_loss_and_grad_takes_no_residuals() -> None:
    with pytest.raises(TypeError, match="residuals"):
        jax_bce.loss_and_grad(LOGITS, LABELS, residuals="recompute")


def test_unknown_keyword(function: Callable) -> None:
    with pytest.raises(TypeError, match="from_logits"):
        function(LOGITS, LABELS, from_logits=True)


def test_an_error_leaves_nothing_behind(function: Callable) -> None:
    """The next call, right this time, works."""
    with pytest.raises(ValueError, match="reduction"):
        function(LOGITS, LABELS, reduction="average")
    assert jax.tree.all(jax.tree.map(lambda r: bool(jnp.isfinite(r).all()), function(LOGITS, 0)))
