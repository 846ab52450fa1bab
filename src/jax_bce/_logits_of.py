"""Removes the final sigmoid of a model, by walking back from the output of its trace."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

Atom = Var | Literal

# These only move or place elements, so they commute with elementwise operations.
_ARRANGING = {"broadcast_in_dim", "copy", "name", "reshape", "reshard", "rev"}
_ARRANGING |= {"sharding_constraint", "slice", "squeeze", "transpose"}
_WRITES = (
    "jax_bce.logits_of: the model writes to its own state while it is traced. To train, take the "
    "sigmoid out of the model; to evaluate, call model.eval() first."
)
_CALLS = {"jit", "remat2", "custom_jvp_call", "custom_vjp_call"}


def logits_of(model: Callable[..., Any]) -> Callable[..., Any]:
    r"""Returns a function that computes the logits of a model, without its final sigmoid.

    For a model :math:`m(x) = \sigma(f(x))`, returns :math:`f`. A call traces the model and
    evaluates everything up to the operand of the sigmoid: nothing is inverted, and no probability
    is rounded. Compile the result, not the model: a ``jax.jit`` around the sigmoid is removed, with
    its shardings and options, and without another one the operations run one by one.

    The result is a function, not a model: it has no weights, layers or ``fit``, but uses those of
    the model, which does not change. To use Keras's ``fit``, change the model instead, and compile
    it again: ``model.layers[-1].activation = keras.activations.linear``.

    Args:
      model: a function, such as ``apply`` of a flax.linen module, or an object with ``__call__``,
        such as a flax.nnx or equinox module, or a Keras model on the JAX backend. It must return
        one array, bare or in a pytree, and end in ``jax.nn.sigmoid`` or ``1 / (1 + jnp.exp(-x))``.
        The sigmoid may be followed by operations that only rearrange elements (reshape, squeeze,
        transpose, broadcast, flip, a slice such as ``[:, 0]``, a sharding constraint) and by casts
        from float to float. It may be inside ``jax.jit``, ``jax.checkpoint``, and custom derivative
        rules that cover only the sigmoid.

    Returns:
      A function that passes its arguments to the model unchanged: arrays, pytrees, modules,
      strings, keywords. It returns the logits in the structure and shape of the model's output, and
      in the dtype they are computed in: casts after the sigmoid are omitted. (A Keras policy such
      as "mixed_bfloat16" gives bfloat16 logits, unless the last layer has ``dtype="float32"``.)

    Derivatives:
      Those of the model up to the sigmoid, to any order, with respect to its arguments and to
      everything it closes over (``nnx.grad`` of a module).

    State:
      As under ``jax.jit``, state that the model stores while it runs would be a tracer. BatchNorm
      and Dropout of flax.nnx store state in training, which raises ``TraceContextError``: to train,
      take the sigmoid out of the model; to evaluate, call ``model.eval()`` first. If the model is
      ``lambda x: nnx.clone(model)(x)``, the copy's state is lost: statistics do not change, and
      each call drops the same units. Keras stores the tracer, and the next use of the model fails:
      never pass ``training=True``; wrap ``stateless_call`` instead. Other uses of the probability
      in the model, such as ``jax.debug.print``, are kept.

    Raises:
      TypeError: if the model cannot be called, such as an unbound flax.linen module.
      ValueError: when called, if the model ends in another operation, which the message names, or
        does not return exactly one array.

    Source:
      On TensorFlow, Keras recovers logits like this, from the last operation of the graph.

    Example:
      >>> import jax, jax.numpy as jnp, jax_bce
      >>> model = lambda weights, x: jax.nn.sigmoid(x @ weights)[:, 0]
      >>> weights, x = jnp.ones((2, 1)), jnp.array([[20.0, 30.0], [-1.0, -2.0]])
      >>> print(model(weights, x), jax.jit(jax_bce.logits_of(model))(weights, x))
      [1.         0.04742587] [50. -3.]
    """
    apply = callable(getattr(model, "apply", None))  # of flax.linen or Haiku
    if not callable(model) or (apply and getattr(model, "scope", model) is None):
        fix = "pass the model, not what it returns"
        if apply:
            fix = "pass model.apply, and call logits_of(model.apply)(variables, x)"
        raise TypeError(
            "model must be a function or an object with __call__ that runs by itself, got "
            f"{type(model).__name__}: {fix}."
        )

    def logits(*args: Any, **keywords: Any) -> Any:
        # All arguments are closed over: objects keep their identity, Python values stay static, and
        # tracers of an outer transformation become constants of the trace.
        try:
            trace, result = jax.make_jaxpr(lambda: model(*args, **keywords), return_shape=True)()
        except Exception as error:
            if type(error).__name__ == "TraceContextError":  # from Flax, which may be missing
                error.add_note(_WRITES)
            raise
        leaves, structure = jax.tree.flatten(result)
        if len(leaves) != 1:
            raise ValueError(
                f"logits_of needs a model that returns one array, got {len(leaves)}: wrap it in a "
                "function that returns the probabilities alone."
            )
        scores = _scores(trace, 0)
        assert callable(scores)  # the trace has no arguments to end at
        return jax.tree.unflatten(structure, [jnp.asarray(scores())])

    return logits


def _scores(
    closed: ClosedJaxpr, output: int
) -> Callable[..., Any] | tuple[list[JaxprEqn], bool, int]:
    """The function that computes the scores of an output from the arguments of the jaxpr.

    If at most the sigmoid is computed between an argument and the output, returns instead: the
    equations that rearrange elements, the last one first; whether a sigmoid was found; and the
    index of the argument.
    """
    jaxpr, arranging, found = closed.jaxpr, list[JaxprEqn](), False
    producers = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}

    def arranged(value: Any) -> Any:
        for eqn in reversed(arranging):
            value = eqn.primitive.bind(value, **eqn.params)  # type: ignore[no-untyped-call]
        return value

    atom = jaxpr.outvars[output]
    while not found and isinstance(atom, Var) and (eqn := producers.get(atom)):
        name, operand = eqn.primitive.name, _operand_of_sigmoid(eqn, producers)
        if operand is not None:
            atom, found = operand, True
        elif name in _ARRANGING:
            arranging.append(eqn)
            atom = eqn.invars[0]
        elif name == "convert_element_type" and all(map(_is_float, (atom, eqn.invars[0]))):
            atom = eqn.invars[0]
        elif name in _CALLS:
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            scores = _scores(inner, eqn.outvars.index(atom))
            if name.startswith("custom_") and (callable(scores) or not scores[1]):
                raise _refusal(f"{name!r}, whose derivative rule is not that of a sigmoid alone,")
            if callable(scores):
                if name == "remat2":
                    options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
                    scores = jax.checkpoint(scores, **options)
                return lambda *arguments: arranged(
                    scores(*_evaluate(closed, eqn.invars, arguments, replaced=eqn))
                )
            inner_arranging, found, argument = scores
            arranging += inner_arranging
            atom = eqn.invars[argument]
        else:
            raise _refusal(repr(name))
    if isinstance(atom, Var) and atom in jaxpr.invars:
        return arranging, found, jaxpr.invars.index(atom)
    if not found:
        raise _refusal("a constant or one of its arguments")
    return lambda *arguments: arranged(*_evaluate(closed, [atom], arguments))


def _operand_of_sigmoid(eqn: JaxprEqn | None, producers: dict[Var, JaxprEqn]) -> Atom | None:
    """x, if the equation is the last one of sigmoid(x) or 1 / (1 + exp(-x)), else None."""
    if eqn and eqn.primitive.name == "logistic":
        return eqn.invars[0]
    for name in ("div", "add", "exp", "neg"):
        if eqn is None or eqn.primitive.name != name:
            return None
        *ones, atom = sorted(eqn.invars, key=_is_one, reverse=True) if name == "add" else eqn.invars
        if not all(map(_is_one, ones)):
            return None
        eqn = producers.get(atom) if isinstance(atom, Var) else None
    return atom


def _is_one(atom: Atom) -> bool:
    return isinstance(atom, Literal) and np.ndim(atom.val) == 0 and bool(atom.val == 1)


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _evaluate(
    closed: ClosedJaxpr,
    wanted: Sequence[Atom],
    arguments: Sequence[Any],
    replaced: JaxprEqn | None = None,
) -> Any:
    """Values inside a jaxpr: runs what they need, and equations with effects except `replaced`."""
    needed, eqns = {atom for atom in wanted if isinstance(atom, Var)}, list[JaxprEqn]()
    for eqn in reversed(closed.jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars) or (eqn.effects and eqn is not replaced):
            eqns.append(eqn)
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
    jaxpr = closed.jaxpr.replace(eqns=eqns[::-1], outvars=list(wanted))
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*arguments)


def _refusal(end: str) -> ValueError:
    return ValueError(
        f"the model ends in {end}, not in a sigmoid: if it returns scores, use it as it is; "
        "otherwise, change it to return scores, or to end in jax.nn.sigmoid with nothing after it "
        "that changes values."
    )
