"""`logits_of` returns what the model computes in front of its sigmoid, bit for bit, or refuses.

Every model here is written twice, with the sigmoid and without; values, values under jit and
gradients of the second are what the first must give.
"""

import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.example_libraries import stax
from jax.nn import sigmoid
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from platforms import QUICKLY

import jax_bce

with warnings.catch_warnings():
    # Any flax that takes the oldest JAX asks it for what it is about to lose.
    warnings.simplefilter("ignore", DeprecationWarning)
    import flax.linen
    import keras
    from flax import nnx

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:flax"), pytest.mark.quickly]

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 1)).astype(np.float32)


def over_devices(count: int) -> NamedSharding:
    mesh = jax.make_mesh((count,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec("batch"))


def scores(x: jax.Array) -> jax.Array:
    """Far beyond where a float32 probability is 1."""
    return 40 * jnp.tanh(jnp.dot(x, W))


def by_hand(z: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-z))


def by_hand_turned(z: jax.Array) -> jax.Array:
    return 1.0 / (jnp.exp(-z) + 1.0)


@jax.custom_jvp
def with_jvp(z: jax.Array) -> jax.Array:
    return sigmoid(z)


@with_jvp.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    p = sigmoid(primals[0])
    return p, p * (1 - p) * tangents[0]


@jax.custom_vjp
def with_vjp(z: jax.Array) -> jax.Array:
    return by_hand(z)


with_vjp.defvjp(lambda z: (sigmoid(z), sigmoid(z)), lambda p, g: (p * (1 - p) * g,))

SIGMOIDS = {
    "jax.nn": sigmoid,
    "jax.scipy": jax.scipy.special.expit,
    "jit in jit": jax.jit(jax.jit(sigmoid)),
    "by hand": by_hand,
    "by hand, turned": by_hand_turned,
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "checkpoint": jax.checkpoint(sigmoid),
    "custom_jvp in jit in checkpoint": jax.checkpoint(jax.jit(with_jvp)),
}
AFTERWARDS = {
    "nothing": lambda p: p,
    "reshape": lambda p: p.reshape(2, 2),
    "squeeze": lambda p: jnp.squeeze(p, 1),
    "column": lambda p: p[:, 0],
    "row": lambda p: p[1:3],
    "None": lambda p: p[None, ..., None],
    "transpose": lambda p: p.T,
    "moveaxis": lambda p: jnp.moveaxis(p, 0, 1),
    "broadcast": lambda p: jnp.broadcast_to(p, (2, 4, 3)),
    "flip, behind a jit": lambda p: jnp.flip(p, 0),
    "reshape in a jit": jax.jit(lambda p: p.ravel()),
    "copy": lambda p: p.copy(),
    "name": lambda p: checkpoint_name(p, "probability"),
    "sharding": lambda p: jax.lax.with_sharding_constraint(p, over_devices(2)),
    "checkpoint": jax.checkpoint(lambda p: p[:, 0]),
    "several": lambda p: jax.jit(lambda p: jnp.atleast_2d(p[:, 0]))(p[1:3].T).swapaxes(0, 1),
}
AROUND = {"nothing": lambda model: model, "jit": jax.jit, "checkpoint": jax.checkpoint}


def same_values(model: Callable, twin: Callable, *arguments: Any) -> None:
    """Of a model and its twin without the sigmoid, operation by operation."""
    __tracebackhide__ = True
    found, expected = jax_bce.logits_of(model)(*arguments), twin(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(oracle.assert_same_bits, found, expected)


def same_compiled(model: Callable, twin: Callable, *arguments: Any) -> None:
    """Values and gradients with respect to every argument, under jit."""
    __tracebackhide__ = True

    def compiled(function: Callable) -> Any:
        def total(*arguments: Any) -> tuple[jax.Array, Any]:
            value = function(*arguments)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(value)), value

        derivative = jax.value_and_grad(total, range(len(arguments)), has_aux=True)
        return jax.jit(derivative, compiler_options=QUICKLY)(*arguments)

    jax.tree.map(oracle.assert_same_bits, compiled(jax_bce.logits_of(model)), compiled(twin))


def check(model: Callable, twin: Callable, *arguments: Any) -> None:
    __tracebackhide__ = True
    same_values(model, twin, *arguments)
    same_compiled(model, twin, *arguments)


@pytest.mark.parametrize("ending", SIGMOIDS)
def test_sigmoids(ending: str) -> None:
    def model(x: jax.Array) -> jax.Array:
        return SIGMOIDS[ending](scores(x))

    check(model, scores, X)
    for around in AROUND.values():
        same_values(around(model), scores, X)


@pytest.mark.parametrize("afterwards", AFTERWARDS)
def test_elements_are_arranged_afterwards(afterwards: str) -> None:
    arrange = AFTERWARDS[afterwards]

    def model(x: jax.Array) -> jax.Array:
        return arrange(sigmoid(scores(x)))

    def twin(x: jax.Array) -> jax.Array:
        return arrange(scores(x))

    check(jax.jit(model), twin, X)
    for around in AROUND.values():
        same_values(around(model), twin, X)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("call", "second"),
    [
        (lambda a, x: (a, sigmoid(scores(x))), lambda x: x),
        (lambda a, z: (a, sigmoid(z)), scores),
        (lambda a, p: (a, jnp.flip(jnp.flip(p))), lambda x: sigmoid(scores(x))),
    ],
    ids=["computes the scores", "takes the scores", "takes the probabilities"],
)
def test_one_of_several_results_and_operands_of_a_call(
    call: Callable, second: Callable, around: str
) -> None:
    called = AROUND[around](call)
    same_values(lambda x: called(2 * x, second(x))[1], scores, X)


def test_a_checkpointed_model() -> None:
    check(
        jax.checkpoint(lambda x: sigmoid(scores(x))[:, 0]),
        jax.checkpoint(lambda x: scores(x)[:, 0]),
        X,
    )


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_casts_afterwards_are_left_out(dtype: str, around: str) -> None:
    """The logits keep the dtype, and the bits, they had before."""
    model = AROUND[around](lambda x: sigmoid(scores(x)).astype(dtype)[:, 0].astype("float16"))
    same_values(model, lambda x: scores(x)[:, 0], X)


def test_casts_in_front_are_kept() -> None:
    """bfloat16 scores are exact in float32, where the sigmoid was taken."""

    def twin(x: jax.Array) -> jax.Array:
        return scores(x).astype(jnp.bfloat16).astype(jnp.float32)

    check(lambda x: sigmoid(twin(x)).astype(jnp.bfloat16), twin, X)


def test_integers_become_floats_in_front_of_the_sigmoid() -> None:
    found = jax_bce.logits_of(jax.scipy.special.expit)(np.arange(3))
    oracle.assert_same_bits(found, np.arange(3, dtype=np.float32))


def test_float64() -> None:
    with jax.enable_x64(True):
        x = X.astype(np.float64)
        check(lambda x: sigmoid(x @ W).astype(jnp.float32), lambda x: x @ W, x)


def test_a_python_number_stays_weakly_typed() -> None:
    for model in (sigmoid, jax.jit(sigmoid), lambda x: by_hand(jnp.asarray(x))):
        found = jax_bce.logits_of(model)(2.0)
        assert isinstance(found, jax.Array)
        assert (found.dtype, found.weak_type, found) == (jnp.float32, True, 2)


def test_a_model_without_arguments() -> None:
    for around in AROUND.values():
        found = jax_bce.logits_of(around(lambda: sigmoid(scores(X))))()
        oracle.assert_same_bits(found, scores(X))


def test_a_pytree_of_one_array_keeps_its_structure() -> None:
    check(lambda x: {"p": (sigmoid(scores(x)), None)}, lambda x: {"p": (scores(x), None)}, X)


def test_arguments_arrive_as_they_are() -> None:
    seen = []

    def model(*arguments: Any, **keywords: Any) -> jax.Array:
        seen.append((arguments, keywords))
        return sigmoid(scores(arguments[0]["x"]) if keywords["training"] else arguments[0])

    given = ({"x": X}, "name", None, 3, object()), {"training": True, "scale": 0.5, "of": [W]}
    found = jax_bce.logits_of(model)(*given[0], **given[1])
    oracle.assert_same_bits(found, scores(X))
    ((arguments, keywords),) = seen
    assert all(one is other for one, other in zip(arguments, given[0], strict=True))
    assert keywords["training"] is True
    assert keywords["of"] is given[1]["of"]


STATIC = jax.jit(lambda x, mode: sigmoid({"a": scores}[mode](x)), static_argnames="mode")


def test_static_arguments_of_an_inner_jit() -> None:
    oracle.assert_same_bits(jax_bce.logits_of(STATIC)(X, mode="a"), scores(X))


def test_every_mode_of_differentiation() -> None:
    def twin(w: jax.Array) -> jax.Array:
        return jnp.tanh(X @ w)[:, 0]

    def modes(function: Callable) -> Callable:
        hessians = [jax.hessian(function), jax.jacrev(jax.jacfwd(function))]
        derivatives = [
            jax.jacfwd(function),
            jax.jacrev(function),
            *hessians,
            jax.jacfwd(hessians[1]),
        ]
        return jax.jit(
            lambda w: [derivative(w) for derivative in derivatives], compiler_options=QUICKLY
        )

    expected = modes(twin)(W)
    for around in (AROUND["nothing"], AROUND["jit"]):
        model = around(lambda w: sigmoid(twin(w)))
        oracle.assert_same_bits(modes(jax_bce.logits_of(model))(W), expected)


@pytest.mark.parametrize("around", AROUND)
def test_vmap(around: str) -> None:
    """Inside and outside, with a mean over the axis that vmap names."""

    def score(x: jax.Array) -> jax.Array:
        return (x - jax.lax.pmean(x, "batch")) @ W[:, 0]

    def model(x: jax.Array) -> jax.Array:
        return sigmoid(score(x))

    mapped = partial(jax.vmap, axis_name="batch")
    model = AROUND[around](model)
    check(mapped(model), mapped(score), X)
    for transformed in (jax_bce.logits_of(mapped(model)), mapped(jax_bce.logits_of(model))):
        oracle.assert_same_bits(transformed(X), mapped(score)(X))


@pytest.mark.parametrize("around", AROUND)
def test_shard_map(around: str) -> None:
    """Inside; a model that is a shard_map itself is refused."""
    mesh = over_devices(2).mesh
    spread = partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("batch"))

    def centred(x: jax.Array) -> jax.Array:
        return x - jax.lax.pmean(x, "batch")

    inside = jax_bce.logits_of(AROUND[around](lambda x: sigmoid(scores(centred(x)))))
    spread = partial(spread, out_specs=PartitionSpec("batch"))
    expected = jax.jit(spread(lambda x: scores(centred(x))))(X)
    oracle.assert_same_bits(jax.jit(spread(inside))(X), expected)
    with pytest.raises(ValueError, match="ends in 'shard_map', not in a sigmoid"):
        jax_bce.logits_of(spread(lambda x: sigmoid(scores(x))))(X)


@pytest.mark.parametrize("around", AROUND)
def test_resharding_afterwards(around: str) -> None:
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(X, PartitionSpec("batch"))
        model = AROUND[around](lambda x: jax.sharding.reshard(sigmoid(2 * x), PartitionSpec()))
        for function in (jax_bce.logits_of(model), jax.jit(jax_bce.logits_of(model))):
            oracle.assert_same_bits(function(x), 2 * X)
            assert function(x).sharding.is_fully_replicated


@pytest.mark.parametrize("around", AROUND)
def test_spread_operands_stay_spread(around: str) -> None:
    x = jax.device_put(X, over_devices(4))
    model = jax_bce.logits_of(AROUND[around](lambda x: sigmoid(scores(x))))
    for function in (model, jax.jit(model)):
        assert function(x).sharding.is_equivalent_to(over_devices(4), 2)


@pytest.mark.parametrize("around", AROUND)
def test_no_tracer_escapes(around: str) -> None:
    model = jax_bce.logits_of(AROUND[around](lambda x: sigmoid(scores(x))))
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(model)(x[None]))))(X)


def primitives(function: Callable) -> list[str]:
    return re.findall(r" = (\w+)", str(jax.make_jaxpr(function)(X)))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("ending", ["jax.nn", "by hand", "custom_vjp"])
def test_nothing_of_the_sigmoid_is_left(ending: str, around: str) -> None:
    """And nothing is computed twice."""
    left = primitives(jax_bce.logits_of(AROUND[around](lambda x: SIGMOIDS[ending](scores(x)))))
    assert sorted(set(left) - {"remat2"}) == ["dot_general", "mul", "tanh"]
    assert len(set(left)) == len(left)


def test_checkpoint_keeps_its_policy() -> None:
    """The backward pass still computes the activations again."""
    policy = jax.checkpoint_policies.dots_saveable
    around = partial(jax.checkpoint, policy=policy, prevent_cse=False)
    deep = jax_bce.logits_of(around(lambda x: sigmoid(jnp.sin(scores(x)))))
    (eqn,) = jax.make_jaxpr(deep)(X).eqns
    assert eqn.primitive.name == "remat2"
    assert (eqn.params["policy"], eqn.params["prevent_cse"]) == (policy, False)


def test_another_use_of_the_probability_stays() -> None:
    """Here it is a gate in the model, and shown, once, on the way."""
    shown = []

    def gated(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = scores(x)
        gate = sigmoid(z)
        jax.debug.callback(lambda p: shown.append(np.asarray(p)), gate)
        return gate, z * gate

    for around in AROUND.values():
        inner = around(gated)
        shown.clear()
        found = jax_bce.logits_of(lambda x, inner=inner: sigmoid(inner(x)[1]))(X)
        jax.effects_barrier()
        oracle.assert_same_bits(found, scores(X) * sigmoid(scores(X)))
        assert len(shown) == 1
        found = jax_bce.logits_of(lambda x, inner=inner: inner(x)[0])(X)
        jax.effects_barrier()
        oracle.assert_same_bits(found, scores(X))
        oracle.assert_same_bits(shown, [np.asarray(sigmoid(scores(X)))] * 2)


@jax.custom_vjp
def clipped_gradient(x: jax.Array) -> jax.Array:
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


@jax.custom_jvp
def with_own_gradient(x: jax.Array) -> jax.Array:
    return sigmoid(scores(x))


with_own_gradient.defjvp(lambda primals, tangents: (sigmoid(scores(*primals)), scores(*tangents)))

ENDS = {
    "a constant or one of its arguments": [lambda x: x, lambda x: 1.0, lambda x: x[0]],
    "'dot_general'": [lambda x: x @ W, lambda x: sigmoid(x) @ W],
    "'max'": [jax.nn.relu, lambda x: jnp.maximum(sigmoid(x), 0.1), jax.jit(jax.nn.relu)],
    "'min'": [lambda x: jnp.clip(sigmoid(x), 1e-7, 1 - 1e-7)],
    "'div'": [
        jax.nn.softmax,
        lambda x: sigmoid(x) / 2,
        lambda x: 2 / (1 + jnp.exp(-x)),
        lambda x: 1 / (2 + jnp.exp(-x)),
        lambda x: 1 / (1 + jnp.exp(x)),
        lambda x: 1 / (1 + jnp.exp2(-x)),
        lambda x: 1 / (1 - jnp.exp(-x)),
        lambda x: (1 + jnp.exp(-x)) / 1,
        lambda x: 1 / (jnp.ones_like(x) + 1),
        lambda x: 1 / (1 + x),
    ],
    "'mul'": [lambda x: 2 * sigmoid(x), lambda x: x * sigmoid(x), jax.nn.silu],
    "'sub'": [lambda x: 1 - sigmoid(x)],
    "'neg'": [jax.nn.log_sigmoid],
    "'tanh'": [jnp.tanh],
    "'gt'": [lambda x: sigmoid(x) > 0.5],
    "'argmax'": [lambda x: jnp.argmax(sigmoid(x))],
    "'convert_element_type'": [
        lambda x: sigmoid(x).astype(int),
        lambda x: sigmoid(x).astype(int).astype(float),
        lambda x: sigmoid(x).astype(jnp.complex64),
    ],
    "'stop_gradient'": [lambda x: jax.lax.stop_gradient(sigmoid(x))],
    "'concatenate'": [lambda x: jnp.concatenate([sigmoid(x), sigmoid(x)])],
    "'scan'": [lambda x: jax.lax.map(sigmoid, x)],
    "'custom_vjp_call', whose derivative rule is not that of a sigmoid alone,": [
        lambda x: clipped_gradient(sigmoid(x)),
    ],
    "'custom_jvp_call', whose derivative rule is not that of a sigmoid alone,": [
        with_own_gradient,
        lambda x: jax.jit(with_own_gradient)(x)[:, 0],
    ],
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("end", ENDS)
def test_other_ends_are_refused(end: str, around: str) -> None:
    """With what was found and what to do; eagerly and under jit."""
    message = (
        f"the model ends in {end}, not in a sigmoid: if it returns scores, use it as it is; "
        "otherwise, change it to return scores, or to end in jax.nn.sigmoid with nothing after it "
        "that changes values."
    )
    for model in ENDS[end]:
        found = jax_bce.logits_of(AROUND[around](model))
        for function in (found, jax.jit(found)):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                function(jnp.asarray(X))


@pytest.mark.parametrize(("outputs", "count"), [(("p", "p"), 2), ((), 0), (None, 0)])
def test_another_number_of_arrays_is_refused(outputs: Any, count: int) -> None:
    found = jax_bce.logits_of(lambda x: jax.tree.map(lambda _: sigmoid(x), outputs))
    with pytest.raises(ValueError, match=f"returns one array, got {count}: wrap it in a function"):
        found(X)


@pytest.mark.parametrize("model", [X, jnp.ones(3), None, "sigmoid"], ids=type)
def test_what_cannot_be_called_is_refused(model: Any) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=f"model must be a function .*, got {name}: pass the model"):
        jax_bce.logits_of(model)


class Wrapped(flax.linen.Module):
    """Its layers are made in setup, so that flax itself speaks of a missing attribute."""

    def setup(self) -> None:
        self.dense = flax.linen.Dense(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return sigmoid(self.dense(x))


@pytest.mark.parametrize("module", [flax.linen.Dense(1), Wrapped(), flax.linen.Sequential([])])
def test_an_unbound_linen_module_is_refused(module: flax.linen.Module) -> None:
    """And so is what Haiku returns, a pair of functions."""
    for model in (module, SimpleNamespace(init=module.init, apply=module.apply)):
        with pytest.raises(TypeError, match=r"logits_of\(model\.apply\)\(variables, x\)"):
            jax_bce.logits_of(model)


def test_a_bound_linen_module() -> None:
    module = Wrapped()
    variables = filled(module.init, X)
    found = jax_bce.logits_of(module.bind(variables))(X)
    oracle.assert_same_bits(found, jax_bce.logits_of(module.apply)(variables, X))
    dense = variables["params"]["dense"]
    oracle.assert_same_bits(found, flax.linen.Dense(1).apply({"params": dense}, X))


def filled(init: Callable, *arguments: Any) -> Any:
    """Parameters, without compiling each of their distributions."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def of_stax() -> tuple:
    start, apply = stax.serial(stax.Dense(8), stax.Relu, stax.Dense(1), stax.Sigmoid)
    _, twin = stax.serial(stax.Dense(8), stax.Relu, stax.Dense(1))
    parameters = filled(lambda key: start(key, X.shape)[1])
    return apply, lambda parameters, x: twin(parameters[:-1], x), parameters


def of_linen() -> tuple:
    layers = [flax.linen.Dense(8), flax.linen.LayerNorm(), flax.linen.gelu, flax.linen.Dense(1)]
    model = flax.linen.Sequential([*layers, flax.linen.sigmoid])
    return model.apply, flax.linen.Sequential(layers).apply, filled(model.init, X)


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def scores(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))[:, 0]

    def __call__(self, x: jax.Array) -> jax.Array:
        return sigmoid(self.scores(x))


def evaluating() -> Network:
    network = Network()
    network.eval()
    return network


def keras_model(
    activation: str | None, dtype: str = "float32", last: str = "float32"
) -> keras.Model:
    keras.utils.set_random_seed(0)  # its twin has the same weights
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(8, "relu", dtype=dtype)(inputs)
    hidden = keras.layers.BatchNormalization(dtype=dtype)(hidden)
    hidden = keras.layers.Dropout(0.5, dtype=dtype)(hidden)
    return keras.Model(inputs, keras.layers.Dense(1, activation, dtype=last)(hidden))


def of_keras() -> tuple:
    model, twin = keras_model("sigmoid"), keras_model(None)
    fixed = [variable.value for variable in model.non_trainable_variables]

    def apply(model: keras.Model) -> Callable:
        return lambda parameters, x: model.stateless_call(parameters, fixed, x)[0]

    return apply(model), apply(twin), [v.value for v in model.trainable_variables]


@pytest.mark.parametrize("library", [of_stax, of_linen, of_keras])
def test_parameters_as_an_argument(library: Callable) -> None:
    model, twin, parameters = library()
    same_compiled(model, twin, parameters, X)


def test_an_nnx_module() -> None:
    """Which the function closes over, or takes as an argument; compiled around it, or not."""
    network = evaluating()

    def closed_over(network: Network) -> jax.Array:
        return jax_bce.logits_of(network)(X)

    def argument(network: Network) -> jax.Array:
        return jax_bce.logits_of(lambda network, x: network(x))(network, x=X)

    @partial(nnx.jit, static_argnums=0)
    def value_and_gradient(scores: Callable, network: Network) -> tuple:
        return nnx.value_and_grad(lambda network: jnp.sum(jnp.sin(scores(network))))(network)

    expected = jax.tree.leaves(value_and_gradient(lambda network: network.scores(X), network))
    assert all(jnp.any(leaf != 0) for leaf in expected)
    for way in (closed_over, argument):
        oracle.assert_same_bits(way(network), network.scores(X))
        found = jax.tree.leaves(value_and_gradient(way, network))
        oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("part", ["norm", "dropout"])
def test_the_state_of_an_nnx_module_is_not_written(part: str) -> None:
    """Flax refuses, with a note of what to do, and the module is as it was."""
    network = evaluating()
    before = network(X)
    getattr(network, part).train()
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate") as error:
        jax_bce.logits_of(network)(X)
    (note,) = (note for note in error.value.__notes__ if note.startswith("jax_bce.logits_of: "))
    assert "take the sigmoid out of the model" in note
    assert "model.eval()" in note
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate"):
        nnx.jit(lambda network: jax_bce.logits_of(network)(X))(network)
    copied = jax_bce.logits_of(lambda network, x: nnx.clone(network)(x))
    expected = nnx.clone(network).scores(X)
    for found in (copied(network, X), nnx.jit(copied)(network, X), copied(network, X)):
        np.testing.assert_allclose(found, expected, rtol=oracle.SURROUNDINGS)
    network.eval()
    oracle.assert_same_bits(network(X), before)


def test_an_equinox_module() -> None:
    model = equinox.nn.MLP(3, "scalar", 8, 1, final_activation=sigmoid, key=jax.random.key(0))
    twin = equinox.tree_at(lambda m: m.final_activation, model, replace=lambda z: z)

    @equinox.filter_jit
    def gradient(change: Callable, model: equinox.Module) -> list[jax.Array]:
        def objective(model: equinox.Module) -> jax.Array:
            return jnp.sum(jnp.sin(jax.vmap(change(model))(X)))

        return jax.tree.leaves(equinox.filter_grad(objective)(model))

    expected = gradient(lambda model: model, twin)
    assert all(jnp.any(leaf != 0) for leaf in expected)
    oracle.assert_same_bits(gradient(jax_bce.logits_of, model), expected)
    for around in (equinox.filter_jit, equinox.filter_checkpoint):
        same_values(around(model), twin, X[0])


def test_a_keras_model() -> None:
    model, twin = keras_model("sigmoid"), keras_model(None)
    check(model, twin, X)
    same_values(partial(model, training=False), twin, X)


@pytest.mark.parametrize(
    ("last", "dtype"), [("mixed_bfloat16", jnp.bfloat16), ("float32", jnp.float32)]
)
def test_a_keras_model_of_mixed_precision(last: str, dtype: np.dtype) -> None:
    """Its logits have the type that its last layer computes in."""
    model, twin = (keras_model(end, "mixed_bfloat16", last) for end in ("sigmoid", None))
    assert jax_bce.logits_of(model)(X).dtype == dtype
    same_values(model, twin, X)


def test_a_keras_model_in_training_is_not_usable_afterwards() -> None:
    """It stores its statistics, which are tracers: JAX says so when they are used."""
    model = keras_model("sigmoid")
    jax_bce.logits_of(model)(X, training=True)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        model(X)
