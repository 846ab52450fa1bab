"""What the tests share: the platforms, the implementations, and comparisons in ulp.

Tests of a missing kernel are skipped, and the reason is shown. If `JAX_BCE_REQUIRE` (a list such as
"cpu,nvcc") names the kernel, they fail instead. The terminal summary prints the largest error of
each kind of comparison. Without `--all`, only a sample of the cases is run; see sample.py.
"""

from collections.abc import Callable, Iterator

import platforms  # isort: skip  # before jax: it says what XLA reads when it starts
import jax
import numpy as np
import oracle
import pytest
import sample
from numpy.typing import ArrayLike


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case, not a sample of them")
    parser.addoption(
        "--record",
        metavar="FILE",
        help="run tests/verification in its full form, and append what it measures to the file",
    )


def pytest_configure(config: pytest.Config) -> None:
    sample.everything = config.getoption("all")


@pytest.hookimpl(trylast=True)  # of what -k and -m select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = sample.of(items)
    config.hook.pytest_deselected(items=[*set(items).difference(chosen)])
    items[:] = chosen


def pytest_report_header() -> list[str]:
    tested = ", ".join(platforms.PLATFORMS)
    reason = platforms.missing("cuda")
    return [
        f"cases: {'all' if sample.everything else 'a sample; --all runs all'}",
        f"platforms: {tested}" + (f" (cuda: {reason})" if reason else ""),
    ]


@pytest.fixture(autouse=True)
def _quickly(request: pytest.FixtureRequest) -> None:
    """Thousands of small programs compile in three quarters of the time. Fewer cases need not."""
    quickly = sample.everything and request.node.get_closest_marker("quickly") is not None
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """`require("cpu")` skips the test, or fails it, where that kernel is missing."""
    return platforms.require


@pytest.fixture(params=platforms.PLATFORMS)
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each platform's kernel, for tests of what only a kernel promises."""
    with platforms.kernel(request.param) as name:
        yield name


@pytest.fixture
def cpu() -> Iterator[str]:
    """The CPU kernel, for tests of what does not exist on a GPU."""
    with platforms.kernel("cpu") as name:
        yield name


@pytest.fixture
def cuda() -> Iterator[str]:
    """The CUDA kernel, for tests that need a GPU."""
    with platforms.kernel("cuda") as name:
        yield name


@pytest.fixture(params=platforms.IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each platform's kernel and, as "xla", XLA's own code on that platform."""
    platform, way = request.param.split("-")
    if request.param != "cpu-xla":  # needs no kernel
        platforms.require(platform)
    with platforms.on(platform):
        yield "xla" if way == "xla" else platform


def _dtype(request: pytest.FixtureRequest) -> Iterator[np.dtype]:
    if request.param.itemsize < 8:
        yield request.param
        return
    with jax.enable_x64(True):
        yield request.param


dtype = pytest.fixture(_dtype, name="dtype", params=oracle.FLOATS, ids=str)
label_dtype = pytest.fixture(
    _dtype, name="label_dtype", params=(*oracle.FLOATS, *oracle.INTEGERS), ids=str
)


class Check:
    """Compares results with exact values, and records the largest error for the summary."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record_property = record

    def _record(self, what: str, value: float) -> None:
        device = jax.config.jax_default_device
        where = "" if device is None or device.platform == "cpu" else "on a GPU: "
        self._record_property(f"{where}{what}", value)

    def ulps(
        self,
        what: str,
        actual: ArrayLike,
        exact: ArrayLike,
        bound: float,
        *,
        scale: ArrayLike | None = None,
        besides: ArrayLike = 0.0,
        flushes: bool = False,
        inputs: tuple[ArrayLike, ...] = (),
    ) -> None:
        """At most `bound` ulp, taken at `scale`, and `besides` in absolute terms."""
        __tracebackhide__ = True
        actual, exact = np.asarray(actual), np.asarray(exact)
        assert actual.shape == exact.shape
        distance = oracle.ulp_distance(actual, exact, actual.dtype, scale)
        if np.any(besides):
            unit = oracle.ulp(exact if scale is None else scale, actual.dtype)
            distance = np.maximum(distance - np.nan_to_num(besides) / unit, 0)
        if flushes:
            tiny = float(np.finfo(oracle.arithmetic_dtype(actual.dtype)).tiny)
            flushed = (actual == 0) & (abs(exact.astype(np.float64)) < tiny)
            distance = np.where(flushed, 0.0, distance)
        worst = distance.max(initial=0.0)
        self._record(f"{what}, {actual.dtype} [ulp, allowed {bound:.5g}]", float(worst))
        if not worst <= bound:
            at = np.unravel_index(np.argmax(distance), distance.shape)
            where = [np.broadcast_to(value, distance.shape)[at] for value in inputs]
            pytest.fail(
                f"{what}: {actual[at]!r} is {worst} ulp from {exact[at]!r}, {bound} are allowed; "
                f"{np.sum(distance > bound)} of {distance.size} are too far, this one at {at}, "
                f"inputs {where!r}"
            )

    def elements(
        self,
        implementation: str,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        loss: ArrayLike | None = None,
        gradient: ArrayLike | None = None,
        factor: ArrayLike = 1.0,
        flushes: bool = False,
        stored: bool = False,
    ) -> None:
        """Elementwise losses and gradients, the latter times `factor`, at the tolerance.

        `flushes` says that XLA touched the result after the kernel, `stored` that the gradient
        waited for the factor in the logits' dtype.
        """
        __tracebackhide__ = True
        tolerance = oracle.TOLERANCE[implementation]
        flushes = flushes or tolerance.flushes
        exact, kind = oracle.exact(logits, labels), oracle.kind_of(labels)
        name = f"{implementation}, {kind} labels"
        if loss is not None:
            bound = tolerance.elements[np.asarray(loss).dtype.name, kind].loss
            self.ulps(
                f"loss, {name}", loss, exact.loss, bound, flushes=flushes, inputs=(logits, labels)
            )
        if gradient is not None:
            gradient = np.asarray(gradient)
            own = tolerance.elements[gradient.dtype.name, kind]
            bound = own.gradient
            scaled = np.any(np.asarray(factor) != 1)
            if scaled:
                bound += oracle.FACTOR * oracle.ulp_of_arithmetic(gradient.dtype)
            if stored and gradient.dtype == oracle.BFLOAT16:
                bound += oracle.STORED_BFLOAT16
            full = oracle.arithmetic_dtype(gradient.dtype) == gradient.dtype
            self.ulps(
                f"gradient{' times a factor' if scaled else ''}, {name}",
                gradient,
                exact.gradient * factor,
                bound,
                scale=exact.gradient_scale * abs(factor) if full else None,
                besides=own.cancelled * abs(factor) * exact.gradient_scale
                if own.cancelled
                else 0.0,
                flushes=flushes,
                inputs=(logits, labels),
            )

    def reduced(
        self,
        implementation: str,
        actual: ArrayLike,
        exact: ArrayLike,
        what: str = "reduced loss",
        *,
        logits: np.dtype = oracle.FLOAT32,
    ) -> None:
        """Losses that add up elements of this dtype, at the relative tolerance of a sum."""
        __tracebackhide__ = True
        actual, exact = np.asarray(actual), np.asarray(exact)
        assert actual.shape == exact.shape
        tolerance = oracle.TOLERANCE[implementation]
        bound = tolerance.sum_16_bit if logits.itemsize == 2 else tolerance.sum
        if actual.dtype == np.float64:
            bound = tolerance.sum_float64
        worst = oracle.relative_error(actual, exact).max(initial=0.0)
        name = (
            f"{what}, {implementation}, {actual.dtype} [relative, allowed 2^{np.log2(bound):.3g}]"
        )
        self._record(name, float(worst))
        assert worst <= bound, f"{name}: {actual!r} against {exact!r}"


@pytest.fixture
def check(record_property: Callable[[str, object], None]) -> Check:
    return Check(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest: dict[str, float] = {}
    for report in (r for rs in terminalreporter.stats.values() for r in rs):
        for name, value in getattr(report, "user_properties", ()):
            largest[name] = max(largest.get(name, 0.0), value)
    if largest:
        terminalreporter.section("largest error reached")
    for name in sorted(largest):
        terminalreporter.write_line(f"{largest[name]:12.5g}  {name}")
