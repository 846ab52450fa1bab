"""Nothing that jnp takes fails when it runs: what the kernel refuses, XLA gets.

Operands that are broadcast against each other in turn leave dimensions that cannot be seen as one.
The kernel takes 16 of them. By name, it says so before it runs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import FLOAT64
from platforms import QUICKLY

import jax_bce
from jax_bce import _primitive

pytestmark = pytest.mark.quickly

MOST = 16
RANKS = [MOST, MOST + 1]
CALL = "jax_bce_v3"


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """In which XLA's sum of so many elements is exact enough."""
    with jax.enable_x64(True):
        yield


def assert_close(actual: jax.Array, expected: jax.Array) -> None:
    """In proportion to the largest: gradients of a mean are small."""
    tolerance = oracle.TOLERANCE["xla"].sum * float(np.max(np.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def inputs(shape: tuple[int, ...], *weights: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(3)
    return (
        oracle.random_logits(FLOAT64, shape, 1),
        oracle.random_labels(np.uint8, shape, 2),
        *(random.uniform(0.5, 2, own).astype(FLOAT64) for own in weights),
    )


def with_weight(**keywords: object) -> Callable:
    def total(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jax_bce.loss(logits, labels, weight=weight, **keywords))

    return jax.jit(jax.value_and_grad(total), compiler_options=QUICKLY)


def every_other(rank: int) -> tuple[int, ...]:
    return tuple(2 - dimension % 2 for dimension in range(rank))


KEYWORDS = [
    {},
    {"reduction": "none"},
    {"axis": -1},
    {"residuals": "recompute"},
]
every_keyword = pytest.mark.parametrize("keywords", KEYWORDS, ids=str)


@every_keyword
@pytest.mark.parametrize("rank", RANKS)
def test_a_weight_of_every_other_dimension(cpu: str, rank: int, keywords: dict) -> None:
    operands = inputs((2,) * rank, every_other(rank))
    function = with_weight(**keywords)
    assert (CALL in function.lower(*operands).as_text()) == (rank <= MOST)
    expected = with_weight(implementation="xla", **keywords)(*operands)
    jax.tree.map(assert_close, function(*operands), expected)


def mapped_in_turn(times: int, **keywords: object) -> Callable:
    """Logits and labels have one dimension in common, then each those that the other lacks."""
    function = jax.value_and_grad(lambda x, y: jnp.sum(jax_bce.loss(x, y, **keywords)))
    for time in range(times):
        function = jax.vmap(function, (None, 0) if time % 2 else (0, None))
    return jax.jit(function, compiler_options=QUICKLY)


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"residuals": "recompute"}])
@pytest.mark.parametrize("ways", RANKS)
def test_mapped_in_turn(cpu: str, ways: int, keywords: dict) -> None:
    times = ways - 1
    logits, _ = inputs((2,) * ((times + 1) // 2) + (3,))
    _, labels = inputs((2,) * (times // 2) + (3,))
    function = mapped_in_turn(times, **keywords)
    assert (CALL in function.lower(logits, labels).as_text()) == (ways <= MOST)
    expected = mapped_in_turn(times, implementation="xla", **keywords)(logits, labels)
    jax.tree.map(assert_close, function(logits, labels), expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.thorough
def test_any_ways(cpu: str, seed: int) -> None:
    """Weights, masks and denominators of any dimensions, also by the kernel where it takes them."""
    random = np.random.default_rng(seed)
    rank = int(random.integers(2, 19))
    shape = tuple(random.choice([1, 2, 2, 2], rank).tolist())
    own = tuple(size if random.integers(2) else 1 for size in shape)
    axis = tuple(sorted(random.choice(rank, random.integers(rank), replace=False).tolist()))
    normalizer = np.ones([size for d, size in enumerate(shape) if d not in axis], FLOAT64)
    where = random.random(shape[: random.integers(rank)]) < 0.7
    keywords = {"axis": axis, "normalizer": normalizer, "where": where}
    operands = inputs(shape, own)
    expected = with_weight(implementation="xla", **keywords)(*operands)
    jax.tree.map(assert_close, with_weight(**keywords)(*operands), expected)


def test_by_name(platform: str) -> None:
    """It is said at once, with the way out."""
    operands = inputs((2,) * (MOST + 1), every_other(MOST + 1))
    function = with_weight(implementation=platform)
    with pytest.raises(RuntimeError, match=r"too many ways.* use implementation=None"):
        function.lower(*operands)
    logits, labels = np.zeros((2,) * 9, FLOAT64), np.zeros((2,) * 8, FLOAT64)
    function = mapped_in_turn(MOST, implementation=platform)
    with pytest.raises(RuntimeError, match=r"different ways.* use implementation=None"):
        function.lower(logits, labels)


def test_on_several_devices(cpu: str) -> None:
    """There the operands are spread out, and all dimensions are seen as two."""
    operands = inputs((2,) * (MOST + 2), every_other(MOST + 2))
    mesh = Mesh(np.array(jax.devices(cpu)).reshape(2, 2, 2), tuple("abc"))
    specs = "abc", "abc", ("a", None, "c")
    spread = [
        jax.device_put(operand, NamedSharding(mesh, PartitionSpec(*spec)))
        for operand, spec in zip(operands, specs, strict=True)
    ]
    expected = with_weight(implementation="xla")(*operands)
    jax.tree.map(assert_close, with_weight(implementation=cpu)(*spread), expected)


@pytest.mark.parametrize("partial_operand", ["labels", "smoothing"])
def test_broadcast_in_a_part_of_the_sum(cpu: str, partial_operand: str) -> None:
    """No public function binds the primitive so; another rule of JAX might."""
    logits, labels = (x.astype(FLOAT64) for x in inputs((3, 4, 5)))
    one = np.ones((1, 1, 1), FLOAT64)
    given = {"labels": labels, "smoothing": one / 8}
    given[partial_operand] = given["labels"][:, :, :1] / 4
    params = {"modifiers": (), "reduced_rank": 2, "count": 20, "loss_dtype": FLOAT64}

    def both(implementation: str | None) -> list[jax.Array]:
        function = partial(
            _primitive.bce, kind="loss_and_grad", implementation=implementation, **params
        )
        return jax.jit(function)(logits, given["labels"], one, given["smoothing"])

    jax.tree.map(assert_close, both(None), both("xla"))
    with pytest.raises(RuntimeError, match="in some of the reduced dimensions only"):
        both(cpu)
