"""A wrong call raises at once: TypeError or ValueError with both values and how to mend it.

Under jit as well as outside, from both public functions.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_bce
from jax_bce import _arguments

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


@pytest.mark.parametrize(
    ("logits_shape", "labels", "mend"),
    [
        ((5, 1), np.zeros(5), "labels.reshape"),
        ((5, 3), np.zeros(5, np.int32), "one_hot(labels, 3)"),
        ((5, 3), np.zeros(3), "jnp.broadcast_to(labels, logits.shape)"),
        ((5,), np.zeros((5, 3)), "one label for each logit"),
        ((3,), np.zeros(4), "one label for each logit"),
    ],
    ids=str,
)
def test_shapes_name_a_mend_that_works(function: Callable, logits_shape, labels, mend) -> None:
    with pytest.raises(ValueError, match=re.escape(mend)):
        function(np.zeros(logits_shape, np.float32), labels)


@pytest.mark.parametrize(("dtype", "mend"), [("uint16", "int32"), ("complex64", "float32")])
def test_labels_name_a_mend_that_loses_nothing(function: Callable, dtype: str, mend: str) -> None:
    with pytest.raises(TypeError, match=rf"labels.astype\(jnp.{mend}\)"):
        function(LOGITS, LABELS.astype(dtype))
    with pytest.raises(TypeError, match=r"labels.astype\(jnp.float32\)"):
        function(LOGITS, jnp.asarray(LABELS, jnp.float8_e4m3fn))


@pytest.mark.parametrize("value", [None, ["cat"], np.array(["cat"]), {"a": 1}], ids=str)
def test_no_numbers(function: Callable, value: object) -> None:
    with pytest.raises(TypeError, match="labels must be an array of numbers"):
        function(LOGITS, value)
    with pytest.raises(TypeError, match="logits must be an array of numbers"):
        function(value, LABELS)


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


@pytest.mark.parametrize(
    "smoothing", [np.float32(1.5), np.float64(-0.25), np.array(7.0), None, "0.1", [0.1]], ids=str
)
def test_label_smoothing_from_numpy(function: Callable, smoothing: np.ndarray) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        function(LOGITS, LABELS, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float17", 3])
def test_dtype_of_the_result(function: Callable, dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"dtype.*{dtype}"):
        function(LOGITS, LABELS, dtype=dtype)


def test_missing_kernel(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason and the remedy; never a silent fall-back from what was asked for."""
    monkeypatch.setattr(_arguments, "missing", lambda platform: f"no {platform}: build it")
    for platform in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match="is not available") as error:
            call(LOGITS, LABELS, implementation=platform)
        assert f"implementation='{platform}'" in str(error.value)
        assert f"no {platform}: build it" in str(error.value)


@pytest.mark.parametrize(("wanted", "target"), [("cpu", "tpu"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_kernel_of_another_platform(
    function: Callable, monkeypatch: pytest.MonkeyPatch, wanted: str, target: str
) -> None:
    monkeypatch.setattr(_arguments, "missing", lambda platform: None)
    traced = jax.jit(partial(function, implementation=wanted)).trace(LOGITS, LABELS)
    with pytest.raises(RuntimeError, match=f"implementation='{wanted}'.* use implementation=None"):
        traced.lower(lowering_platforms=(target,))


CALL = {
    "logits": np.zeros((2, 3), np.float32),
    "labels": np.zeros((2, 3), np.float32),
    "scale": np.ones((1, 1), np.float32),
    "smoothing": np.zeros((1, 1), np.float32),
    "results": [((2,), np.float32)],
    "modifiers": 0,
    "reduced_rank": 1,
    "count": 3,
}


def loss_by_the_handler(call: dict) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct(*result) for result in call["results"]]
    target = jax.ffi.ffi_call("jax_bce_v1_loss", results, has_side_effect=True)
    operands = [call[name] for name in ("logits", "labels", "scale", "smoothing")]
    attributes = {name: np.int64(call[name]) for name in ("modifiers", "reduced_rank", "count")}
    return jax.block_until_ready(target(*operands, **attributes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((2, 3), np.int32)}, "floating-point"),
        ({"labels": np.zeros((2, 3), np.complex64)}, "labels have an unsupported dtype"),
        ({"labels": np.zeros(3, np.float32)}, "labels and logits differ in rank"),
        ({"labels": np.zeros((2, 4), np.float32)}, "labels cannot be broadcast in dimension 1"),
        ({"scale": np.ones((1, 1), np.float16)}, "scale must be float64 for float64 logits"),
        ({"smoothing": np.ones((1, 1), np.int32)}, "smoothing must be float64 for float64 logits"),
        ({"scale": np.ones((1, 3), np.float32)}, "scale must not vary"),
        ({"labels": np.zeros((1, 3), np.float32), "reduced_rank": 2}, "broadcast in some of the"),
        ({"reduced_rank": 3}, "reduced_rank 3"),
        ({"reduced_rank": -1}, "reduced_rank -1"),
        ({"count": 0}, "count must be positive"),
        ({"results": [((3,), np.float32)]}, "3 elements instead of 2"),
        ({"results": [((2,), np.float16)]}, "a result has an unsupported dtype"),
        ({"results": [((2,), np.int32)]}, "a result has an unsupported dtype"),
        ({"results": []}, "a result is missing"),
        ({"results": [((2,), np.float32)] * 2}, "a result too many"),
    ],
    ids=str,
)
def test_the_handler_checks_again(check, platform: str, change: dict, message: str) -> None:
    """A call from elsewhere reads and writes nothing beyond its buffers."""
    check.reduced(platform, loss_by_the_handler(CALL)[0][0], np.log(2))
    with pytest.raises(Exception, match=f"jax_bce: .*{message}"):
        loss_by_the_handler(CALL | change)


@pytest.mark.parametrize("columns", [3, 20_000])
def test_the_handler_takes_scalars_and_sums_to_float64(platform: str, columns: int) -> None:
    """For partitioned programs: one label for all has no rank, and sums are rounded later."""
    logits = np.linspace(-3, 5, 2 * columns, dtype=np.float32).reshape(2, columns)
    call = CALL | {"logits": logits, "labels": np.full_like(logits, 1), "count": columns}
    if platform == "cuda" and columns > 8192:
        call["results"] = [*call["results"], ((6,), np.float64)]
    with jax.enable_x64(True):
        narrow = loss_by_the_handler(call)[0]
        call |= {
            name: np.float32(call[name].ravel()[0]) for name in ("labels", "scale", "smoothing")
        }
        oracle.assert_same_bits(loss_by_the_handler(call)[0], narrow)
        call["results"] = [((2,), np.float64), *call["results"][1:]]
        wide = np.asarray(loss_by_the_handler(call)[0])
    oracle.assert_same_bits(wide.astype(np.float32), np.asarray(narrow))
    assert np.all(wide != wide.astype(np.float32))


@pytest.mark.parametrize("name", ["logits", "labels"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_memory_of_the_host(platform: str, function: Callable, name: str, jit: bool) -> None:
    """A kernel would read it as the device's."""
    operands = {"logits": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)}
    device = next(iter(operands[name].devices()))
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    operands[name] = jax.device_put(operands[name], host)
    with pytest.raises(ValueError, match=rf"{name} are in the host.*jax\.memory\.Space\.Device"):
        (jax.jit(function) if jit else function)(**operands)


@pytest.mark.parametrize("positional", [("mean",), ("mean", None), (None, None, "mean")], ids=len)
def test_options_are_keywords(function: Callable, positional: tuple) -> None:
    with pytest.raises(TypeError, match="positional"):
        function(LOGITS, LABELS, *positional)


def test_the_relatives_have_the_keywords_of_loss() -> None:
    """All but residuals, and those whose meaning a relative has another name for."""
    keywords = inspect.signature(jax_bce.loss).parameters
    shared = {k: v.default for k, v in keywords.items() if v.kind is v.KEYWORD_ONLY}
    assert shared.pop("residuals") == "gradient"
    assert shared == {
        k: v.default
        for k, v in inspect.signature(_arguments.prepare).parameters.items()
        if v.kind is v.KEYWORD_ONLY and k != "name"
    }
    assert set(shared) - {"pos_weight"} == set(_arguments.Keywords.__annotations__)


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
