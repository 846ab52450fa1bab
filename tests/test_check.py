"""The debug check: what it says of mistakes, in every transformation, and that nothing of it is
there while it is off."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import platforms
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from platforms import QUICKLY

import jax_bce
from jax_bce import _check

pytestmark = pytest.mark.quickly

LOGITS = np.linspace(-3, 3, 32, dtype=np.float32).reshape(8, 4)
PROBS = 1 / (1 + np.exp(-LOGITS))
ZEROS_AND_ONES = (np.arange(32).reshape(8, 4) % 3 == 0).astype(np.uint8)
SIGNS = np.where(ZEROS_AND_ONES, 1, -1).astype(np.int8)
NAN = np.where(np.arange(32).reshape(8, 4) == 5, np.float32(np.nan), 1)
NAN_ROW = np.where(np.arange(8)[:, None] == 5, np.float32(np.nan), 1)


class Warned(list[tuple[str, str, int]]):
    """Message, file and line of each warning."""

    @property
    def messages(self) -> list[str]:
        return [message for message, _, _ in self]


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Warned:
    """Taken where they are given: a callback's thread need not see what this one records."""
    record = Warned()

    def keep(message: str, category: type[Warning], filename: str, line: int) -> None:
        assert category is UserWarning
        record.append((message, filename, line))

    monkeypatch.setattr(warnings, "warn_explicit", keep)
    return record


ROWS = np.arange(32).reshape(8, 4)
INFINITE = np.where(ROWS == 5, np.float32(np.inf), 1)
# What it is, its values, and how each thing that is said of it begins.
MISTAKES: list[tuple[str, np.ndarray, list[str]]] = [
    (
        "labels",
        ROWS % 10,
        ["are whole numbers up to 9: for class indices, use jax.nn.one_hot(label"],
    ),
    ("labels", ROWS * np.uint8(8), ["are whole numbers up to 248: for class indices"]),
    ("labels", ROWS % 2 + 1, ["are 1 and 2, not 0 and 1: use labels == 2"]),
    ("labels", SIGNS, ["are -1 and 1, not 0 and 1: use (labels + 1) / 2"]),
    (
        "labels",
        ROWS % 3 - 1,
        ["are -1, 0 and 1: if -1 means that there is no label, pass ignore_l"],
    ),
    (
        "labels",
        -ZEROS_AND_ONES.astype(int),
        ["are -1, 0 and 1: if -1 means that there is no label"],
    ),
    ("labels", ZEROS_AND_ONES * np.uint8(255), ["are 0 and 255, not 0 and 1: use labels > 0"]),
    ("labels", LOGITS, ["lie between -3 and 3, outside [0, 1]: they must be probab"]),
    ("labels", np.float32([0.1, 1 + 1e-7]), ["lie between 0.1 and 1.0000001, outside [0, 1]"]),
    ("labels", NAN, ["with NaN: drop them with where=~jnp.isnan(labels)"]),
    ("labels", NAN * SIGNS, ["with NaN: drop them", "are -1 and 1, not 0 and 1"]),
    ("labels", INFINITE, ["with infinity: use values from 0 to 1"]),
    ("logits", PROBS, ["all lie in [0, 1], as probabilities do: pass the model's scores from bef"]),
    ("logits", ZEROS_AND_ONES, ["are all 0 or 1, as labels are: logits come first, labels second"]),
    ("logits", LOGITS * NAN, ["with NaN: jax.config.update('jax_debug_nans', True) finds where"]),
    ("logits", LOGITS * INFINITE, ["with infinity: the model overflows; drop padding with where="]),
    ("probs", LOGITS, ["lie between -3 and 3, outside [0, 1]: for raw scores, call jax_bce.loss"]),
    ("probs", NAN, ["with NaN: jax.config.update('jax_debug_nans', True)"]),
    ("weight", SIGNS, ["goes down to -1, and the loss then has no minimum: make it 0 or more"]),
    ("sample_weight", NAN, ["with NaN: drop elements with where=, not by their weight"]),
    ("pos_weight", INFINITE * SIGNS, ["with infinity: drop elements", "goes down to -1, and"]),
    (
        "loss",
        LOGITS,
        ["goes down to -3, below 0: some label lies outside [0, 1], or a weight, the"],
    ),
    ("loss", NAN, ["with NaN: a logit, a label, a weight or the normalizer is NaN"]),
    ("loss", INFINITE, ["with infinity: an infinite logit, or a probability of exactly 0 or 1"]),
    # These are meant.
    ("labels", ZEROS_AND_ONES, []),
    ("labels", ZEROS_AND_ONES > 0, []),
    ("labels", PROBS, []),
    ("logits", LOGITS, []),
    ("logits", LOGITS.astype(jnp.bfloat16), []),
    ("logits", np.zeros((8, 4), np.float32), []),  # of a model before it is trained
    ("logits", PROBS[:3], []),  # they may lie there by chance
    ("logits", np.zeros((0, 4), np.float32), []),
    ("probs", PROBS, []),
    ("pos_weight", ROWS, []),
    ("loss", ROWS, []),
]


@pytest.mark.any_jax
@pytest.mark.parametrize(("name", "values", "expected"), MISTAKES)
def test_mistakes_are_named(name: str, values: np.ndarray, expected: list[str]) -> None:
    found = _check._look(jnp.asarray(values), None)
    said = _check.problems(name, _check.Found(*map(np.asarray, found)))
    assert len(said) == len(expected), said
    for message, start in zip(said, expected, strict=True):
        assert message.startswith(f"{name} {start}"), message


CALLS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "loss": (
        lambda: jax_bce.loss(LOGITS, 1, weight=[1, 1, 1, -0.5], sample_weight=[-2] * 8),
        ["sample_weight goes down to -2", "weight goes down to -0.5", "loss goes down to"],
    ),
    "loss, swapped": (
        lambda: jax_bce.loss(ZEROS_AND_ONES.astype(np.float32), LOGITS, reduction="none"),
        ["labels lie between -3 and 3", "logits are all 0 or 1", "loss goes down to"],
    ),
    "loss_and_grad": (
        lambda: jax_bce.loss_and_grad(LOGITS, 1, normalizer=-1),
        ["loss goes down to"],
    ),
    "grad_and_hess": (lambda: jax_bce.grad_and_hess(LOGITS, SIGNS), ["labels are -1 and 1"]),
    "focal_loss": (lambda: jax_bce.focal_loss(PROBS, 1), ["logits all lie in [0, 1]"]),
    "asymmetric_loss": (
        lambda: jax_bce.asymmetric_loss(LOGITS, 1, weight=-1.0),
        ["weight goes down to -1", "loss goes down to"],
    ),
    "loss_from_probs": (
        lambda: jax_bce.loss_from_probs(LOGITS, ZEROS_AND_ONES, epsilon=1e-7),
        ["probs lie between -3 and 3"],
    ),
    "a drop-in": (
        lambda: jax_bce.torch_like.binary_cross_entropy_with_logits(
            jnp.asarray(PROBS), jnp.ones(PROBS.shape)
        ),
        ["logits all lie in [0, 1]"],
    ),
    # What is dropped is not looked at.
    "ignored": (lambda: jax_bce.loss(LOGITS, SIGNS, ignore_label=-1), []),
    "a masked row": (
        lambda: jax_bce.loss(
            LOGITS * NAN_ROW, LOGITS * 0 + NAN_ROW, weight=NAN_ROW, where=~np.isnan(NAN_ROW[:, 0])
        ),
        [],
    ),
    "masked elements": (lambda: jax_bce.focal_loss(LOGITS * NAN, 1, where=~np.isnan(NAN)), []),
    "all of them": (lambda: jax_bce.loss(LOGITS * np.nan, -1, ignore_label=-1), []),
    "nothing": (lambda: jax_bce.loss(np.zeros((0, 3), np.float32), np.zeros((0, 3))), []),
}


@pytest.mark.any_jax
@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_is_given_and_gives(warned: Warned, name: str) -> None:
    """The check makes no NaN of its own either, where JAX looks for them."""
    call, expected = CALLS[name]
    with jax_bce.checking(), jax.debug_nans(True):
        jax.jit(call, compiler_options=QUICKLY)()
    assert len(warned) == len(expected), warned
    for start, (message, filename, _) in zip(expected, warned, strict=True):
        assert message.startswith(f"jax_bce: {start}"), message
        assert filename == __file__


def mean(x: jax.Array, y: jax.Array, **options: object) -> jax.Array:
    return jax_bce.loss(x, y, **options)


LINE = mean.__code__.co_firstlineno + 1


def scan(x: jax.Array, y: jax.Array, **options: object) -> jax.Array:
    return jax.lax.scan(lambda sum_, xy: (sum_ + mean(*xy, **options), None), 0.0, (x, y))[0]


def while_loop(x: jax.Array, y: jax.Array, **options: object) -> jax.Array:
    def step(state: tuple) -> tuple:
        return state[0] + 1, state[1] + mean(x, y, **options)

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, 0.0))[1]


def cond(x: jax.Array, y: jax.Array, **options: object) -> jax.Array:
    return jax.lax.cond(x[0, 0] < 0, lambda: mean(x, y, **options), lambda: 0.0)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("rows",), (kind,), devices=jax.devices("cpu")[:8])


def shard_map(x: jax.Array, y: jax.Array, **options: object) -> jax.Array:
    def shard(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(mean(x, y, **options), "rows")

    mesh = mesh_of(AxisType.Auto)
    return jax.shard_map(shard, mesh=mesh, in_specs=P("rows"), out_specs=P())(x, y)


def of_options(transform: Callable) -> Callable:
    """A transformation of the loss, which takes the options of the loss."""
    return lambda x, y, **options: transform(lambda x, y: mean(x, y, **options))(x, y)


# For everything but a while_loop, which has no gradient in reverse mode, the gradient too.
WAYS: dict[str, Callable] = {
    "as it is": mean,
    "grad": of_options(jax.grad),
    "hessian": of_options(lambda f: jax.hessian(f)),
    "linearize": of_options(lambda f: lambda x, y: jax.linearize(lambda x: f(x, y), x)[1](x)),
    "checkpoint": of_options(lambda f: jax.grad(jax.checkpoint(f))),
    "vmap": of_options(lambda f: jax.vmap(jax.grad(f))),
    "vmap of labels": of_options(lambda f: lambda x, y: jax.vmap(f, (None, 0))(x[0], y)),
    "scan": scan,
    "grad of scan": jax.grad(scan),
    "vmap of scan": of_options(lambda f: lambda x, y: jax.vmap(scan)(x[:, None], y[:, None])),
    "while_loop": while_loop,
    "cond": cond,
    "shard_map": shard_map,
    "grad of shard_map": jax.grad(shard_map),
}


@pytest.mark.parametrize(
    ("way", "jit"),
    [*((way, True) for way in WAYS), *((way, False) for way in ("as it is", "grad", "vmap"))],
)
@pytest.mark.second
def test_in_every_transformation(cpu: str, warned: Warned, way: str, jit: bool) -> None:
    """One warning, whatever runs how often, and of the line that called the loss."""

    def function(x: jax.Array, y: jax.Array) -> object:
        return WAYS[way](x, y)

    with jax_bce.checking():
        called = jax.jit(function, compiler_options=QUICKLY) if jit else function
        called(jnp.asarray(LOGITS), jnp.asarray(SIGNS))
    about_labels = [(f, line) for message, f, line in warned if "-1 and 1" in message]
    assert about_labels == [(__file__, LINE)], warned


@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_on_every_implementation(warned: Warned, implementation: str, residuals: str) -> None:
    """With the results that there are without the check, bit for bit."""

    @jax.jit
    def function(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array) -> jax.Array:
            return mean(x, SIGNS, residuals=residuals, implementation=implementation)

        return jax.value_and_grad(loss)(x)

    without = function(LOGITS)
    assert not warned
    with jax_bce.checking():
        checked = function(LOGITS)
    assert any("-1 and 1" in message for message in warned.messages)
    del warned[:]
    again = function(LOGITS)
    assert not warned
    for results in (checked, again):
        for actual, expected in zip(results, without, strict=True):
            np.testing.assert_array_equal(actual, expected, strict=True)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_spread_over_a_mesh(cpu: str, warned: Warned, kind: AxisType) -> None:
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh), jax_bce.checking():
        operands = jax.device_put((LOGITS, SIGNS), NamedSharding(mesh, P("rows")))
        jax.jit(jax.value_and_grad(mean))(*operands)
    assert len([m for m in warned.messages if "-1 and 1" in m]) == 1


def test_vmap_calls_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what all mapped elements hold: those of one alone may be too few to judge."""
    calls = []
    monkeypatch.setattr(_check, "_warn", lambda line, judges, found: calls.append(found))
    with jax_bce.checking():
        jax.jit(jax.vmap(jax.vmap(mean, (0, None))))(PROBS, ZEROS_AND_ONES[:, 0])
    of_operands = [found for found in calls if "logits" in found]
    assert len(of_operands) == 1
    assert of_operands[0]["logits"].count == PROBS.size
    assert of_operands[0]["labels"].count == ZEROS_AND_ONES[:, 0].size


def test_off_nothing_of_it_is_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [
        jax.value_and_grad(mean),
        lambda x, y: jax_bce.loss_and_grad(x, y, where=x > 0),
        jax_bce.focal_loss,
    ]

    def programs() -> list[str]:
        return [
            str(jax.make_jaxpr(lambda x, y, f=f: f(x, y))(LOGITS, ZEROS_AND_ONES))
            for f in functions
        ]

    off = programs()
    with jax_bce.checking():
        on = programs()
        with jax_bce.checking(False):
            assert programs() == off
    monkeypatch.setattr(_check, "operands", lambda *operands: None)
    monkeypatch.setattr(_check, "loss", lambda values: values)
    assert programs() == off
    assert all("callback" in program for program in on)


def test_each_line_is_warned_of_once_a_run(warned: Warned) -> None:
    for _ in range(2):
        with jax_bce.checking():
            for least in (-1.5, -2.5):
                jax_bce.grad_and_hess(LOGITS, ZEROS_AND_ONES, weight=least)
            jax_bce.grad_and_hess(LOGITS, ZEROS_AND_ONES, weight=-3.5)
        assert [m.split(",")[0] for m in warned.messages] == [
            "jax_bce: weight goes down to -1.5",
            "jax_bce: weight goes down to -3.5",
        ]
        del warned[:]


SCRIPT = """
import jax, jax.numpy as jnp, jax_bce
step = jax.jit(jax.grad(jax_bce.loss))
for _ in range(3):
    jax.block_until_ready(step(jnp.ones(3), jnp.array([-1, 1, 1])))
jax.effects_barrier()
print("done")
"""


def script(folder: Path, *options: str, check: str) -> subprocess.CompletedProcess[str]:
    path = folder / "train.py"
    path.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, *options, str(path)],
        cwd=folder,
        env=platforms.environment("cpu") | {"JAX_BCE_CHECK": check},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.second
def test_for_a_whole_program(tmp_path: Path) -> None:
    """Switched on from outside, and, where warnings are errors, a readable one."""
    done = script(tmp_path, check="1")
    assert done.stdout == "done\n", done.stderr
    said = "train.py:5: UserWarning: jax_bce: labels are -1 and 1, not 0 and 1: use (labels + 1)"
    assert done.stderr.count(said) == 1, done.stderr

    failed = script(tmp_path, "-W", "error:jax_bce", check="1")
    assert failed.stdout == ""
    assert "JaxRuntimeError" in failed.stderr
    error = "UserWarning: jax_bce: labels are -1 and 1, not 0 and 1: use (labels + 1) / 2.\n"
    assert failed.stderr.count(error) == 2, failed.stderr  # logged, and at the end of the error


def checked_by_jax(function: Callable, x: object, y: object, errors: frozenset) -> str | None:
    checked = checkify.checkify(lambda x, y: function(x, y), errors=errors)
    error, _ = jax.jit(checked, compiler_options=QUICKLY)(x, y)
    return error.get()


@pytest.mark.parametrize("way", [mean, scan, jax.vmap(jax.grad(mean))])
@pytest.mark.second
def test_checkify_sees_what_the_check_does(cpu: str, warned: Warned, way: Callable) -> None:
    """As user checks. docs/transforms.md says so."""
    assert checked_by_jax(way, LOGITS, SIGNS, checkify.user_checks) is None
    with jax_bce.checking():
        error = checked_by_jax(way, LOGITS, SIGNS, checkify.user_checks)
        assert "labels should be finite and lie between 0 and 1" in error
        assert "lie between -1.0 and 1.0" in error
        assert checked_by_jax(way, LOGITS, ZEROS_AND_ONES, checkify.all_checks) is None


def test_checkify_sees_a_nan_of_the_kernel(implementation: str, warned: Warned) -> None:
    """Without the check that of a gradient alone, as docs/transforms.md says."""

    def error(function: Callable, **options: object) -> str | None:
        def called(x: jax.Array, y: jax.Array) -> jax.Array:
            return function(x, y, implementation=implementation, **options)

        return checked_by_jax(called, LOGITS * NAN, ZEROS_AND_ONES, checkify.float_checks)

    assert error(mean) is None
    assert "nan generated by primitive" in error(jax.grad(mean))
    with jax_bce.checking():
        assert "nan generated by primitive" in error(mean, reduction="none")


@pytest.mark.any_jax
def test_the_example_of_checkify(warned: Warned) -> None:
    """That of docs/transforms.md runs as it stands, and finds the NaN that it is given."""
    page = (Path(__file__).parent.parent / "docs" / "transforms.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (example,) = (text for text in examples if "checkify" in text)
    found: dict = {}
    exec(compile(example, "transforms.md", "exec"), found)
    assert "logits should be finite" in found["error"].get()


INDICES = np.arange(8, dtype=np.int32).reshape(4, 2)


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("positives", "expected"),
    [
        (INDICES, None),
        (INDICES - 1, None),
        (np.float32([[1, 0, 0], [0, 0, 2], [1, -1, 0]]).astype(int), None),
        (INDICES + 1, "go up to 8, and the last of 8 labels is 7: what is beyond counts as paddi"),
        (INDICES - 2, "go down to -2, which counts as padding: pad with -1"),
        (np.eye(4, 8, dtype=np.int32), "of shape (4, 8) are 0 and 1 alone: pass a matrix of label"),
    ],
)
def test_indices_of_labels(warned: Warned, positives: np.ndarray, expected: str | None) -> None:
    """Which are not known under jit."""
    features, weight = np.ones((len(positives), 3), np.float32), np.ones((3, 8), np.float32)

    @jax.jit
    def gradient(weight: jax.Array, positives: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jax_bce.linear_loss(features, w, positives=positives))(weight)

    with jax_bce.checking():
        gradient(weight, positives)
    assert len(warned) == (expected is not None), warned
    for message in warned.messages:
        assert message.startswith(f"jax_bce: positives {expected}"), message


PROBLEMS = (Path(__file__).parent.parent / "docs" / "problems.md").read_text()


@pytest.mark.any_jax
def test_the_page_of_problems_warns_as_it_says(warned: Warned) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PROBLEMS, re.DOTALL)
    exec(compile(example, "problems.md", "exec"), {})
    losses = "jax_bce: loss"  # class indices make it negative as well
    said = [message for message in warned.messages if not message.startswith(losses)]
    assert said == re.findall(r"^jax_bce: .*", PROBLEMS, re.MULTILINE)
    assert {filename for _, filename, _ in warned} == {"problems.md"}


def test_export_refuses_what_is_checked() -> None:
    function = jax.jit(mean)
    jax.export.export(function)(LOGITS, ZEROS_AND_ONES)
    with jax_bce.checking(), pytest.raises(NotImplementedError, match="callback"):
        jax.export.export(function)(LOGITS, ZEROS_AND_ONES).serialize()
