"""A wrong call raises at once: TypeError or ValueError with both values and how to fix it.

Under jit as well as outside, from every public function; what the message names as the fix works.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_bce
from jax_bce import _arguments, _primitive

pytestmark = pytest.mark.quickly

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
    ("logits_shape", "labels", "fix"),
    [
        ((5, 1), np.zeros(5), "labels.reshape"),
        ((5, 3), np.zeros(5, np.int32), "one_hot(labels, 3)"),
        ((5, 3), np.zeros(3), "jnp.broadcast_to(labels, logits.shape)"),
        ((5,), np.zeros((5, 3)), "one label for each logit"),
        ((3,), np.zeros(4), "one label for each logit"),
    ],
    ids=str,
)
def test_shapes_name_a_fix_that_works(function: Callable, logits_shape, labels, fix) -> None:
    with pytest.raises(ValueError, match=re.escape(fix)):
        function(np.zeros(logits_shape, np.float32), labels)


@pytest.mark.parametrize(
    ("dtype", "fix"), [("uint16", "labels.astype(jnp.int32)"), ("complex64", "labels.real")]
)
def test_labels_name_a_fix_that_loses_nothing(function: Callable, dtype: str, fix: str) -> None:
    with pytest.raises(TypeError, match=re.escape(fix)):
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


@pytest.mark.parametrize("axis", [1.0, "0", (0, 1.5), True, (0, True)], ids=str)
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
    with pytest.raises((TypeError, ValueError), match="label_smoothing"):
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
    target = jax.ffi.ffi_call("jax_bce_v3_loss", results, has_side_effect=True)
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
        (
            {"labels": np.zeros((1, 3), np.float32), "reduced_rank": 2},
            "labels is broadcast in some of the",
        ),
        ({"reduced_rank": 3}, "reduced_rank must be from 0 to .* 2, got 3"),
        ({"reduced_rank": -1}, "reduced_rank must be .*, got -1"),
        ({"count": 0}, "count must be positive"),
        ({"results": [((3,), np.float32)]}, "3 elements instead of 2"),
        ({"results": [((2,), np.float16)]}, "loss has an unsupported dtype"),
        ({"results": [((2,), np.int32)]}, "loss has an unsupported dtype"),
        ({"results": []}, "the result loss is missing"),
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
    with pytest.raises(
        ValueError, match=rf"{name} must be in device memory.*jax\.memory\.Space\.Device"
    ):
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
        for k, v in inspect.signature(_arguments.checked).parameters.items()
        if v.kind is v.KEYWORD_ONLY and k not in ("name", "numbers")
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


# --- every message, and its fix -----------------------------------------------------------------

FLOATS = "['float16', 'bfloat16', 'float32', 'float64']"
NUMBERS = f"{FLOATS[:-1]}, 'bool', 'int8', 'uint8', 'int16', 'int32', 'int64']"
WEIGHTED = ("loss", "loss_and_grad", "focal_loss", "asymmetric_loss", "loss_from_probs")
EVERY = (*WEIGHTED, "grad_and_hess")
POSITIVE = ("loss", "loss_and_grad", "loss_from_probs", "grad_and_hess")
ONES = np.ones(5, np.float32)
FIFTHS = ONES / 5
OWN = {
    "alpha": "focal_loss",
    "gamma": "focal_loss",
    "gamma_neg": "asymmetric_loss",
    "gamma_pos": "asymmetric_loss",
    "clip": "asymmetric_loss",
    "epsilon": "loss_from_probs",
    "log_epsilon": "loss_from_probs",
    "hess_floor": "grad_and_hess",
}

# The functions, what they are told, the whole message, and what it advises.
MESSAGES = [
    *(
        (
            functions,
            {name: np.zeros((), dtype)},
            TypeError,
            f"{name} must be one of {NUMBERS}, got {dtype}: use {fix.format(name)}.",
            {name: np.zeros((), fixed)},
        )
        for name, functions in (
            *(("weight", EVERY), ("sample_weight", EVERY), ("pos_weight", POSITIVE)),
            ("normalizer", WEIGHTED),
            *((name, (function,)) for name, function in OWN.items()),
        )
        for dtype, fix, fixed in (
            ("complex64", "{0}.real or abs({0})", "float32"),
            ("uint16", "{}.astype(jnp.int32)", "int32"),
            ("uint32", "{}.astype(jnp.float32)", "float32"),
            (">f4", "{}.astype(jnp.float32)", "float32"),
        )
    ),
    *(
        (
            functions,
            {name: FIFTHS},
            ValueError,
            f"{name} of shape (5,) cannot be broadcast to logits of shape (4, 3): pass one "
            "number, or shape (3,), or shape (4, 3).",
            {name: FIFTHS[:3]},
        )
        for name, functions in (
            *(("weight", EVERY), ("pos_weight", POSITIVE)),
            *((name, (function,)) for name, function in OWN.items()),
        )
    ),
    (
        EVERY,
        {"weight": ONES[:4]},
        ValueError,
        "weight of shape (4,) cannot be broadcast to logits of shape (4, 3): for axis 0 of the "
        "logits, weight[:, None].",
        {"weight": ONES[:4, None]},
    ),
    (
        EVERY,
        {"sample_weight": ONES[:3]},
        ValueError,
        "sample_weight of shape (3,) does not fit logits of shape (4, 3): expected (4,), one per "
        "row, or (4, 3); for axis 1 of the logits, weight=sample_weight.",
        {"weight": ONES[:3]},
    ),
    (
        EVERY,
        {"sample_weight": ONES},
        ValueError,
        "sample_weight of shape (5,) does not fit logits of shape (4, 3): expected (4,), one per "
        "row, or (4, 3).",
        {"sample_weight": ONES[:4]},
    ),
    (
        EVERY,
        {"sample_weight": np.ones((4, 2))},
        ValueError,
        "sample_weight of shape (4, 2) does not fit logits of shape (4, 3): expected (4,), one per "
        "row, or (4, 3).",
        {"sample_weight": np.ones((4, 3))},
    ),
    (
        WEIGHTED,
        {"where": ONES[:4]},
        TypeError,
        "where must be one of ['bool'], got float32: compare, where > 0, or use "
        "where.astype(bool).",
        {"where": ONES[:4] > 0},
    ),
    (
        WEIGHTED,
        {"where": np.ones(3, bool)},
        ValueError,
        "where of shape (3,) does not fit logits of shape (4, 3): expected (4,), one per row, or "
        "(4, 3); for axis 1 of the logits, where[None].",
        {"where": np.ones((1, 3), bool)},
    ),
    (
        WEIGHTED,
        {"ignore_label": np.array([1, 2])},
        ValueError,
        "ignore_label must be one number, got shape (2,).",
        {"ignore_label": np.array(1)},
    ),
    (
        WEIGHTED,
        {"labels": LABELS.astype(np.uint8), "ignore_label": -1},
        ValueError,
        "labels of dtype uint8 cannot hold ignore_label=-1: store them as jnp.int8 from the "
        "start, or mask with where.",
        {"labels": LABELS.astype(np.int8), "ignore_label": -1},
    ),
    (
        WEIGHTED,
        {"normalizer": ONES, "axis": 0},
        ValueError,
        "normalizer of shape (5,) must be one number, or have the result's shape (3,).",
        {"normalizer": ONES[:3], "axis": 0},
    ),
    (
        WEIGHTED,
        {"normalizer": ONES[:3]},
        ValueError,
        "normalizer of shape (3,) must be one number, or have the result's shape ().",
        {"normalizer": ONES[0]},
    ),
    (
        WEIGHTED,
        {"axis": 0, "reduction": "none"},
        ValueError,
        "axis=0 has no meaning with reduction='none': leave axis=None.",
        {"reduction": "none"},
    ),
    (
        WEIGHTED,
        {"normalizer": 2.0, "reduction": "none"},
        ValueError,
        "normalizer=2.0 has no meaning with reduction='none': leave normalizer=None.",
        {"reduction": "none"},
    ),
    (
        WEIGHTED,
        {"axis": 2},
        ValueError,
        "axis 2 is out of range for logits of shape (4, 3).",
        {"axis": 1},
    ),
    (
        WEIGHTED,
        {"axis": (0, -2)},
        ValueError,
        "axis names a dimension twice: (0, -2) for logits of shape (4, 3).",
        {"axis": (0, -1)},
    ),
    (
        WEIGHTED,
        {"axis": 1.0},
        TypeError,
        "axis must be an int or a sequence of ints, got 1.0.",
        {"axis": [1]},
    ),
    (
        WEIGHTED,
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must be from 0 to 1, got 1.5: label_smoothing=0 leaves labels as they "
        "are.",
        {"label_smoothing": 0},
    ),
    (
        WEIGHTED,
        {"reduction": "average"},
        ValueError,
        "reduction must be one of ['none', 'sum', 'mean', 'weighted_mean'], got 'average': use "
        "'mean'.",
        {"reduction": "mean"},
    ),
    *(
        (
            WEIGHTED,
            {"reduction": theirs},
            ValueError,
            "reduction must be one of ['none', 'sum', 'mean', 'weighted_mean'], got "
            f"{theirs!r}: use {ours!r}.",
            {"reduction": ours},
        )
        for theirs, ours in (
            (None, "none"),
            ("sum_over_batch_size", "mean"),
            ("mean_with_sample_weight", "weighted_mean"),
        )
    ),
    (
        WEIGHTED,
        {"reduction": LOGITS},
        ValueError,
        "reduction must be one of ['none', 'sum', 'mean', 'weighted_mean'], got an array of shape "
        "(4, 3).",
        {"reduction": "mean"},
    ),
    (
        EVERY,
        {"logits": LOGITS[:, 0], "labels": LABELS[:, 0], "weight": ONES[:2]},
        ValueError,
        "weight of shape (2,) cannot be broadcast to logits of shape (4,): pass one number, or "
        "shape (4,); for one weight per class of integer labels, weight[labels].",
        {"logits": LOGITS[:, 0], "labels": LABELS[:, 0], "weight": ONES[:2][LABELS[:, 0]]},
    ),
    (
        POSITIVE,
        {"logits": LOGITS[:, 0], "labels": LABELS[:, 0], "pos_weight": ONES[:2]},
        ValueError,
        "pos_weight of shape (2,) cannot be broadcast to logits of shape (4,): pass one number, or "
        "shape (4,).",
        {"logits": LOGITS[:, 0], "labels": LABELS[:, 0], "pos_weight": ONES[0]},
    ),
    (
        WEIGHTED,
        {"dtype": "int32"},
        TypeError,
        f"dtype must be one of {FLOATS}, got 'int32'.",
        {"dtype": "bfloat16"},
    ),
    (
        WEIGHTED,
        {"implementation": "gpu"},
        ValueError,
        "implementation must be one of [None, 'cpu', 'cuda', 'xla'], got 'gpu'.",
        {"implementation": "xla"},
    ),
    (
        ("loss",),
        {"residuals": "all"},
        ValueError,
        "residuals must be one of ['gradient', 'recompute'], got 'all'.",
        {"residuals": "recompute"},
    ),
    (
        EVERY,
        {"labels": LABELS.astype(np.uint16)},
        TypeError,
        f"labels must be one of {NUMBERS}, got uint16: use labels.astype(jnp.int32).",
        {"labels": LABELS.astype(np.int32)},
    ),
    (
        EVERY,
        {"labels": None},
        TypeError,
        "labels must be an array of numbers, got NoneType: pass numbers.",
        {"labels": 0},
    ),
    (
        POSITIVE[:2],
        {"logits": LABELS},
        TypeError,
        f"logits must be one of {FLOATS}, got int32: logits come first, labels second; pass the "
        "model's raw scores before the sigmoid, or logits.astype(jnp.float32).",
        {"logits": LABELS.astype(np.float32)},
    ),
    (
        ("loss_from_probs",),
        {"logits": LABELS},
        TypeError,
        f"probs must be one of {FLOATS}, got int32: probs come first, labels second; or use "
        "probs.astype(jnp.float32).",
        {"logits": LABELS.astype(np.float32)},
    ),
    (
        EVERY,
        {"labels": LABELS[:, 0]},
        ValueError,
        "labels of shape (4,) do not match {scores} of shape (4, 3): for class indices, "
        "jax.nn.one_hot(labels, 3); to repeat them along the other axes, for axis 0 of the "
        "{scores}, jnp.broadcast_to(labels[:, None], {scores}.shape).",
        {"labels": jax.nn.one_hot(LABELS[:, 0], 3)},
    ),
    (
        EVERY,
        {"labels": LABELS[0]},
        ValueError,
        "labels of shape (3,) do not match {scores} of shape (4, 3): for class indices, "
        "jax.nn.one_hot(labels, 4, axis=0); to repeat them along the other axes, for axis 1 of the "
        "{scores}, jnp.broadcast_to(labels, {scores}.shape).",
        {"labels": jnp.broadcast_to(LABELS[0], LOGITS.shape)},
    ),
    (
        EVERY,
        {"labels": LABELS.T[None, :, :, None]},
        ValueError,
        "labels of shape (1, 3, 4, 1) do not match {scores} of shape (4, 3): pass one label for "
        "each logit, or one scalar label for all.",
        {"labels": 1},
    ),
    *(
        (
            (function,),
            {"implementation": "cpu"},
            RuntimeError,
            f"implementation='cpu' is not available for {function}, which has no kernel of its "
            "own: use implementation=None.",
            {"implementation": None},
        )
        for function in ("loss_from_probs",)
    ),
]


def invoke(name: str, keywords: dict) -> None:
    """Traces a call, which checks all that it is told and computes nothing."""
    keywords = {"logits": LOGITS, "labels": LABELS, **keywords}
    logits, labels = keywords.pop("logits"), keywords.pop("labels")
    jax.eval_shape(lambda: getattr(jax_bce, name)(logits, labels, **keywords))


@pytest.mark.parametrize(
    ("name", "keywords", "error", "message", "fixed"),
    [
        pytest.param(name, keywords, *case, id=f"{name}-{'-'.join(keywords)}")
        for names, keywords, *case in MESSAGES
        for name in names
    ],
)
def test_message_and_fix(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    keywords: dict,
    error: type,
    message: str,
    fixed: dict,
) -> None:
    """The whole message, before any work is done; what it advises is accepted."""
    invoke(name, fixed)
    calls = []
    monkeypatch.setattr(_primitive.bce_p, "bind", lambda *_, **__: calls.append(1))
    scores = "probs" if name == "loss_from_probs" else "logits"
    with pytest.raises(error) as raised:
        invoke(name, keywords)
    assert str(raised.value) == message.replace("{scores}", scores)
    assert not calls


@pytest.mark.parametrize(("name", "function"), OWN.items())
def test_a_number_for_each_sample_is_told_to_be_a_column(name: str, function: str) -> None:
    """sample_weight, which is the advice for a weight, is nothing that these could become."""
    with pytest.raises(ValueError, match=re.escape(f"{name}[:, None]")):
        invoke(function, {name: FIFTHS[:4]})
    invoke(function, {name: FIFTHS[:4, None]})


@pytest.mark.parametrize("label", [0.5, 300, np.nan])
def test_ignore_label_that_no_integer_is(label: float) -> None:
    """int8 does not hold them either, and NaN is not taken for the label 0."""
    with pytest.raises(ValueError, match=f"cannot hold ignore_label={label}") as error:
        invoke("loss", {"labels": LABELS.astype(np.uint8), "ignore_label": label})
    assert "jnp.int8" not in str(error.value)


def test_text_is_no_array_of_numbers() -> None:
    """The whole message is one line."""
    with pytest.raises(TypeError) as error:
        invoke("loss", {"weight": np.array("one")})
    assert str(error.value).startswith("weight must be an array of numbers, got ndarray")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVERY[1:])
@pytest.mark.parametrize("keyword", ["from_logits", "residuals"])
def test_unknown_keywords_name_the_function_that_was_called(name: str, keyword: str) -> None:
    focal = name in ("focal_loss", "asymmetric_loss")
    with pytest.raises(ValueError if focal and keyword == "residuals" else TypeError) as error:
        invoke(name, {keyword: True})
    if focal and keyword == "residuals":
        return
    hint = ": only jax_bce.loss, focal_loss and asymmetric_loss have the option residuals."
    message = f"{name}() got an unexpected keyword argument '{keyword}'"
    assert str(error.value) == message + hint * (keyword == "residuals" and name in WEIGHTED)


@pytest.mark.parametrize("focus", [0, 2.0])
@pytest.mark.parametrize("name", ["focal_loss", "asymmetric_loss"])
def test_pos_weight_has_no_meaning_beside_a_focus(name: str, focus: float) -> None:
    """Neither ignored nor half of it taken."""
    keywords = {"gamma": focus} if name == "focal_loss" else {"gamma_neg": focus, "clip": 0}
    keywords |= {} if name == "focal_loss" else {"gamma_pos": focus}
    with pytest.raises(TypeError, match=r"'pos_weight': .*\balpha\b"):
        invoke(name, {**keywords, "pos_weight": 3.0})
    invoke(name, keywords)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "sum", "axis": -1, "dtype": np.float32},
        {"label_smoothing": 0.1, "pos_weight": 3.0, "normalizer": 7.0},
        {"weight": 2, "sample_weight": 0.5, "ignore_label": 1, "reduction": "sum"},
    ],
    ids=lambda options: "-".join(options),
)
def test_checks_are_no_part_of_the_program(platform: str, options: dict) -> None:
    """What is compiled is one call of the kernel."""
    of = jax.jit(partial(jax_bce.loss, **options, implementation=platform))
    compiled = of.lower(LOGITS, LABELS).compile()
    assert hlo.passes(compiled, 1) == [f"{hlo.TARGET}loss"]
