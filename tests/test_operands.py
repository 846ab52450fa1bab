"""The one way in: every operand of every function may be wrapped, traced or not, and has a range.

What is no dense array of numbers is refused at once, with its dtype and what to pass instead.
"""

import re
import time
from collections.abc import Callable
from datetime import date
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.sparse
from flax import nnx
from jax.experimental import sparse

import jax_bce
from jax_bce import optax, torch_like

pytestmark = pytest.mark.quickly

LOGITS = np.linspace(-3, 3, 12, dtype=np.float32).reshape(4, 3)
PROBS = (LOGITS + 4) / 8
LABELS = (np.arange(12).reshape(4, 3) % 3 == 0).astype(np.float32)


class Wrapper:
    """The least that is converted: not even the names of NumPy's protocol."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __jax_array__(self) -> jax.Array:
        return self.value if isinstance(self.value, jax.Array) else jnp.asarray(self.value)


class OfNumPy:
    """What NumPy converts."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.value, dtype)


COMMON = {
    "weight": np.float32([1, 2, 3]),
    "sample_weight": np.float32([1, 0, 2, 1]),
    "label_smoothing": np.float32(0.25),
    "where": np.array([True, True, False, True]),
    "ignore_label": np.float32(1),
    "normalizer": np.float32(3),
}
POSITIVE = {"pos_weight": np.float32([2, 1, 3])}
OWN = {
    "loss": POSITIVE,
    "loss_and_grad": POSITIVE,
    "focal_loss": {"alpha": np.float32(0.25), "gamma": np.float32(1.5)},
    "asymmetric_loss": {
        "gamma_neg": np.float32(3),
        "gamma_pos": np.float32([1, 0, 2]),
        "clip": np.float32(0.125),
    },
    "loss_from_probs": POSITIVE | {"epsilon": np.float32(0.25), "log_epsilon": np.float32(0.125)},
}
PEERS = {
    optax.sigmoid_binary_cross_entropy: {},
    optax.sigmoid_focal_loss: {"alpha": np.float32(0.25), "gamma": np.float32(1.5)},
    torch_like.binary_cross_entropy_with_logits: POSITIVE | {"weight": COMMON["weight"]},
    torch_like.sigmoid_focal_loss: {"alpha": np.float32(0.75), "gamma": np.float32(1.5)},
}
# Every function, and every keyword that is no mere option of it.
CALLS = [
    *((getattr(jax_bce, name), COMMON | own) for name, own in OWN.items()),
    (
        jax_bce.grad_and_hess,
        {k: COMMON[k] for k in ("weight", "sample_weight")}
        | POSITIVE
        | {"hess_floor": np.float32(0.2)},
    ),
    *PEERS.items(),
]
CASES = [
    pytest.param(function, name, value, id=f"{function.__module__}.{function.__name__}-{name}")
    for function, keywords in CALLS
    for name, value in ({"first": None, "second": None} | keywords).items()
]


def bound(function: Callable, name: str, value: object) -> tuple[Callable, object]:
    """The call as a function of that one argument, and the argument."""
    first = PROBS if function is jax_bce.loss_from_probs else LOGITS
    if name == "first":
        return (lambda wrapped: function(wrapped, LABELS)), first
    if name == "second":
        return (lambda wrapped: function(first, wrapped)), LABELS
    return (lambda wrapped: function(first, LABELS, **{name: wrapped})), value


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_every_operand_may_be_wrapped(function: Callable, name: str, value: object) -> None:
    """By Flax, or by anything else that says how it becomes an array; known, or traced."""
    call, value = bound(function, name, value)
    wrapped = (nnx.Param(jnp.asarray(value)), Wrapper(value), OfNumPy(value), value.tolist())

    @jax.jit
    def all_of_them(array: jax.Array) -> tuple[list, list]:
        known = [call(value), *map(call, wrapped)]
        return known, [call(array), call(Wrapper(array)), call(nnx.Param(array))]

    for results in all_of_them(value):
        for result in results[1:]:
            jax.tree.map(oracle.assert_same_bits, result, results[0])


@pytest.mark.parametrize("name", ["label_smoothing", "ignore_label", "gamma", "weight"])
def test_a_parameter_of_flax(name: str) -> None:
    """nnx.jit traces what it holds; outside, it is known."""
    call, value = bound(FUNCTION[name], name, COMMON.get(name, np.float32(1.5)))
    parameter = nnx.Param(jnp.asarray(value))
    oracle.assert_same_bits(call(parameter), call(value))
    oracle.assert_same_bits(nnx.jit(call)(parameter), jax.jit(call)(value))


def test_the_cases_are_all_there_are() -> None:
    """Of each public function all keywords but those that are options."""
    options = {"reduction", "axis", "dtype", "residuals", "implementation", "stop_gradient_weight"}
    names = {case.values[1] for case in CASES if case.values[0] is jax_bce.loss}
    keywords = jax_bce.loss.__kwdefaults__
    assert names == {"first", "second", *keywords} - options
    for function in (jax_bce.focal_loss, jax_bce.asymmetric_loss, jax_bce.loss_from_probs):
        names = {case.values[1] for case in CASES if case.values[0] is function}
        assert set(function.__kwdefaults__) - options <= names


def test_a_wrapped_number_has_a_gradient() -> None:
    def of(smoothing: nnx.Param) -> jax.Array:
        return jax_bce.loss(LOGITS, LABELS, label_smoothing=smoothing)

    exact = jax.grad(lambda s: jax_bce.loss(LOGITS, LABELS, label_smoothing=s))(0.1)
    oracle.assert_same_bits(nnx.grad(of)(nnx.Param(jnp.float32(0.1)))[...], exact)


def test_a_list_of_traced_and_wrapped_numbers() -> None:
    exact = jax.jit(lambda w: jax_bce.loss(LOGITS, LABELS, weight=w))(np.float32([1, 2, 3]))
    actual = jax.jit(lambda a: jax_bce.loss(LOGITS, LABELS, weight=[a, Wrapper(a + 1), 3]))(1.0)
    oracle.assert_same_bits(actual, exact)


# --- ranges --------------------------------------------------------------------------------------

# Of each number what is in its range, what is outside, and what the message advises.
RANGES = {
    "label_smoothing": ([0, 0.5, 1], [-0.1, 1.5], "label_smoothing=0"),
    "alpha": ([0, 0.25, 1], [-1, 2], "alpha=None"),
    "gamma": ([0, 2, 1e4], [-1, np.inf], "gamma=0"),
    "gamma_neg": ([0, 2, 1e4], [-1, np.inf], "gamma_neg=0"),
    "gamma_pos": ([0, 2, 1e4], [-1, np.inf], "gamma_pos=0"),
    "clip": ([0, 0.05, 0.99], [-0.05, 1, 2], "clip=0"),
    "epsilon": ([0, 1e-7, 0.49], [-1e-7, 0.5, 0.9], "epsilon=None"),
    "log_epsilon": ([0, 1e-7, 1], [-1e-7, np.inf], "log_epsilon=0"),
    "hess_floor": ([0, 1e-16, 1], [-1, np.inf], "hess_floor=0"),
}
FUNCTION = {
    name: function
    for function, keywords in CALLS
    for name in keywords
    if function.__module__.startswith("jax_bce._")
}


def call(name: str, value: object) -> object:
    function, argument = bound(FUNCTION[name], name, value)
    return function(argument)


@pytest.mark.any_jax
@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range(name: str) -> None:
    """Also one for each class, one in a wrapper, and a known one under jit; NaN always is."""
    inside, outside, fix = RANGES[name]
    for value in [*outside, np.nan]:
        values = [np.float32(value), jnp.float32(value), Wrapper(jnp.float32(value)), value]
        if name != "label_smoothing":
            values.append(np.float32([inside[1], inside[1], value]))
        for given in values:
            for form in (call, lambda *args: jax.jit(lambda: call(*args))()):
                with pytest.raises(ValueError, match=f"{name} must be .*, got .*{fix}") as error:
                    form(name, given)
                shown = str(error.value).partition("got ")[2]
                assert shown.startswith((str(value), str(np.float32(value))))
    for value in inside:
        jax.eval_shape(lambda value=value: call(name, value))


@pytest.mark.any_jax
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [True, np.array(False), None], ids=str)
def test_what_is_no_number_of_a_range(name: str, value: object) -> None:
    """True would count as 1; None is timm's way to say that nothing is clipped."""
    if value is None and name in ("alpha", "epsilon"):
        jax.eval_shape(lambda: call(name, value))
        return
    with pytest.raises(TypeError, match=f"{name} must be a number, .*{RANGES[name][2]}"):
        call(name, value)


@pytest.mark.any_jax
def test_a_traced_number_is_taken_as_it_is() -> None:
    jax.eval_shape(partial(call, "alpha"), np.float32(2))
    jax.eval_shape(jax.vmap(partial(call, "label_smoothing")), np.float32([-1, 2]))


@pytest.mark.any_jax
def test_a_number_at_a_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, got 2\.0 at \[1\]: "):
        call("alpha", np.float32([0.5, 2, 3]))


@pytest.mark.any_jax
@pytest.mark.parametrize("value", [-2.0, np.inf, 0.0])
def test_weights_and_denominators_have_no_range(value: float) -> None:
    """What a user divides by, or weighs with, is arithmetic, as in optax and PyTorch."""
    for name in ("weight", "sample_weight", "pos_weight", "normalizer"):
        jax.eval_shape(lambda name=name: call(name, value))


@pytest.mark.any_jax
def test_none_of_torchvision() -> None:
    """There, and only there, a negative alpha is none."""
    exact = jax_bce.focal_loss(LOGITS, LABELS, reduction="none")
    for alpha in (-1, None, Wrapper(-0.5), np.float32(-1)):
        oracle.assert_same_bits(torch_like.sigmoid_focal_loss(LOGITS, LABELS, alpha=alpha), exact)
    with pytest.raises(ValueError, match="alpha=None"):
        torch_like.sigmoid_focal_loss(LOGITS, LABELS, alpha=1.5)


# --- what is refused -----------------------------------------------------------------------------


class Column:
    """A nullable column of pandas, as far as this package looks at it."""

    class dtype:
        na_value = None

    def __init__(self, *values: float | None) -> None:
        self.values = values

    def isna(self) -> np.ndarray:
        return np.array([value is None for value in self.values])

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.array([np.nan if v is None else v for v in self.values])


class Nulls(OfNumPy):
    """A column of Polars, whose null_count is a method; that of Arrow is a number."""

    def null_count(self) -> int:
        return int(np.isnan(self.value).sum())


class Tensor:
    """A tensor of PyTorch that is part of its graph."""

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def detach(self) -> None: ...


REFUSED = {
    "bcoo": (sparse.BCOO.fromdense(LABELS), "BCOO: it is sparse, use {}.todense()"),
    "bcsr": (sparse.BCSR.fromdense(LABELS), "BCSR: it is sparse, use {}.todense()"),
    "scipy": (scipy.sparse.csr_array(LABELS), "csr_array: it is sparse, use {}.toarray()"),
    "text": ("yes", "str: pass numbers"),
    "texts": (["yes", "no"], "str: pass numbers"),
    "array of text": (np.array(["yes", "no"]), "got ndarray of text: pass numbers"),
    "digits": (np.array(["1", "0"]), "got ndarray of text: use {}.astype(jnp.float32)"),
    "objects": (np.array([1, 0.5], object), "of dtype object: use {}.astype(jnp.float32)"),
    "missing objects": (
        np.array([1, None], object),
        "of dtype object: some values are missing, fill",
    ),
    "dates": (np.array(["2026-11-29"], "M8[D]"), "of dtype datetime64[D]: pass numbers."),
    "date objects": (np.array([date(2026, 11, 29)], object), "of dtype object: pass numbers."),
    "records": (np.zeros(3, [("a", "f4"), ("b", "f4")]), "such as {}['a']"),
    "big-endian": (LABELS.astype(">f8"), "got >f8: use {}.astype(jnp.float64)"),
    "longdouble": (LABELS.astype(np.longdouble), "got float128: use {}.astype(jnp.float64)"),
    "complex": (LABELS.astype(np.complex64), "got complex64: use {0}.real or abs({0})"),
    "dict": ({"image": LABELS}, "got dict: pass one of its values, such as {}['image']"),
    "set": ({0, 1}, "got set: pass numbers"),
    "None in a list": ([1.0, None], "got NoneType: pass numbers"),
    "key": (jax.random.key(0), "of dtype key<fry>: pass numbers"),
    "pandas": (
        Column(1, None),
        "got Column: some values are missing, fill them or drop their rows",
    ),
    "polars": (
        Nulls([1, np.nan]),
        "got Nulls: some values are missing, fill them or drop their rows",
    ),
    "masked": (
        np.ma.array([1, 2], mask=[0, 1]),
        "got MaskedArray: some values are masked, use {0}.filled(0) with where=~{0}.mask",
    ),
    "tensor": (Tensor(), "got Tensor: use jnp.from_dlpack({}.detach())"),
    "ragged": ([[1.0, 2.0], [3.0]], "has arrays of shapes (2,) and (1,): pass arrays of one shape"),
}
WAYS_IN = {
    "logits": lambda value: jax_bce.loss(value, LABELS),
    "probs": lambda value: jax_bce.loss_from_probs(value, LABELS),
    "labels": lambda value: jax_bce.loss(LOGITS, value),
    **{name: partial(call, name) for name in FUNCTION if name != "where"},
}


@pytest.mark.any_jax
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dense_array_of_numbers(kind: str) -> None:
    """Whichever operand it is; not NaN, and nothing that is left out, in silence."""
    value, message = REFUSED[kind]
    for name, way in WAYS_IN.items():
        with pytest.raises((TypeError, ValueError)) as error:
            way(value)
        assert str(error.value).startswith(name)
        assert message.format(name) in str(error.value)


@pytest.mark.any_jax
def test_a_mask_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"object: use where\.astype\(bool\)"):
        jax_bce.loss(LOGITS, LABELS, where=np.array([True, False, True, True], object))
    with pytest.raises(TypeError, match=r"where\.todense\(\)"):
        jax_bce.loss(LOGITS, LABELS, where=sparse.BCOO.fromdense(LABELS > 0))


@pytest.mark.any_jax
def test_missing_labels_are_told_of_ignore_label() -> None:
    with pytest.raises(TypeError, match=r"labels\.fillna\(-1\) with ignore_label=-1"):
        jax_bce.loss(LOGITS[:2, 0], Column(1, None))
    with pytest.raises(TypeError, match=r"compare, such as np\.array\(labels\) == 'yes'"):
        jax_bce.loss(LOGITS[:2, 0], ["yes", "no"])
    with pytest.raises(TypeError, match="compare, such as target == 'yes'"):
        torch_like.BCEWithLogitsLoss()(LOGITS[:2, 0], np.array(["yes", "no"]))
    for values in (["yes", "no"], [b"yes", b"no"]):
        for dtype in (None, object):
            with pytest.raises(TypeError, match=f"compare, such as labels == {values[0]!r}"):
                jax_bce.loss(LOGITS[:2, 0], np.array(values, dtype))


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("outputs", "index"),
    [
        ((LOGITS, {"batch_stats": {}}), 0),
        ([LOGITS, {"batch_stats": {}}], 0),
        (({"batch_stats": {}}, LOGITS), 1),
        ((LOGITS, None), 0),
        ((LOGITS, LOGITS), 0),
        ((jnp.asarray(LOGITS), jnp.asarray(LOGITS)), 0),
    ],
    ids=["linen", "list", "states first", "none", "two", "two of JAX"],
)
def test_the_outputs_of_a_model(outputs: tuple | list, index: int) -> None:
    """Not stacked, and not taken for numbers; each of these has its scores at the index."""
    what = f"a {type(outputs).__name__} of 2: pass one of them, such as"
    for name, function in (
        ("logits", jax_bce.loss),
        ("logits", jax.jit(jax_bce.loss)),
        ("probs", jax_bce.loss_from_probs),
        ("input", torch_like.binary_cross_entropy_with_logits),
        ("inputs", torch_like.sigmoid_focal_loss),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must .*{what} {name}\[{index}\]\."):
            function(outputs, LABELS)
    jax.eval_shape(lambda: jax_bce.loss(outputs[index], LABELS))


@pytest.mark.any_jax
def test_rows_of_labels_and_weights_are_stacked() -> None:
    """And of logits in a list, as NumPy does."""
    exact = jax_bce.loss(LOGITS, LABELS, weight=LABELS)
    for rows in (tuple, list):
        actual = jax_bce.loss(list(LOGITS), rows(LABELS), weight=rows(LABELS))
        oracle.assert_same_bits(actual, exact)
    with pytest.raises(TypeError, match=r"got a list of 2: pass one of them, such as labels\[0\]"):
        jax_bce.loss(LOGITS, [{"a": LABELS}, {"b": LABELS}])


def test_a_column_without_missing_values() -> None:
    exact = jax_bce.loss(LOGITS[:2, 0], np.float32([1, 0]))
    for column in (Column(1, 0), Nulls([1.0, 0.0]), np.ma.array([1, 0], mask=[0, 0])):
        oracle.assert_same_bits(jax_bce.loss(LOGITS[:2, 0], column), exact)


@pytest.mark.any_jax
def test_sparse_labels_are_refused_before_they_are_read() -> None:
    one, index = np.ones(50, np.float32), np.arange(50, dtype=np.int32)
    labels = sparse.BCOO((one, np.stack([index, index], 1)), shape=(64, 50))
    start = time.perf_counter()
    with pytest.raises(TypeError, match=r"labels\.todense\(\)"):
        jax_bce.loss(np.zeros((64, 50), np.float32), labels)
    assert time.perf_counter() - start < 1


@pytest.mark.any_jax
@pytest.mark.parametrize("value", [2**40, np.array([1, -(2**31) - 1, 3]), [2**31, 1, 1]], ids=str)
def test_integers_beyond_32_bits(value: object) -> None:
    """JAX would keep their last bits."""
    with pytest.raises(ValueError, match=r"weight contains .*np\.float32\(weight\)"):
        call("weight", value)
    jax.eval_shape(lambda: call("weight", np.float32(value)))
    with jax.enable_x64(True):
        jax.eval_shape(lambda: call("weight", value))


@pytest.mark.any_jax
@pytest.mark.parametrize("function", [jax_bce.loss, jax_bce.focal_loss], ids=lambda f: f.__name__)
def test_swapped_arguments_are_recognised(function: Callable) -> None:
    for dtype in (bool, np.int32, np.uint8):
        with pytest.raises(TypeError, match="logits come first, labels second"):
            function(LABELS.astype(dtype), LOGITS)


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("where", [1, 0]),
        ("logits", [1, 2]),
        ("labels", [0, 10**30]),
        ("labels", ["0", "1"]),
        ("labels", [0j, 1j]),
        ("labels", ["no", "yes"]),
    ],
    ids=str,
)
def test_the_fix_of_a_list_runs_on_a_list(name: str, value: list) -> None:
    operands = {"logits": [1.0, 2.0], "labels": [0, 1]} | {name: value}
    with pytest.raises(TypeError) as error:
        jax_bce.loss(**operands)
    found = re.search(
        rf"(np\.asarray\({name}\)\.\S+|np\.a\w+\({name}\) [>=]+ [^,.]+)", str(error.value)
    )
    assert found, error.value
    fixed = eval(found[1].rstrip("."), {name: value, "np": np, "jnp": jnp})
    jax_bce.loss(**operands | {name: fixed})
