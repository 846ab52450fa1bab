"""The derivative rules of the primitive, and the memory-lean `recompute`.

The kind "loss" is differentiated into "loss_and_grad", whose gradient is the only residual, and
"loss_and_grad" into plain jnp. The rule belongs to the primitive, so every mode and nesting of
differentiation uses it. Derivatives with respect to anything but the logits are plain jnp as well,
and are only computed if requested.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad

from jax_bce._primitive import bce, bce_p, spread_like
from jax_bce._reference import (
    Elements,
    arithmetic_dtype,
    by_label,
    by_pos_weight,
    divide,
    element_gradient,
    element_hessian,
    element_loss,
    elements,
    focus_of,
    formulas,
    reference,
    sum_trailing,
    times,
)

jet: Any
try:
    from jax.experimental import jet
except ImportError:  # experimental modules may be removed; the package works without this one
    jet = None

_OPERANDS = ("logits", "labels", "scale", "smoothing")


def residual_dtype(logits_dtype: np.dtype) -> np.dtype:
    """The dtype of a gradient stored for the backward pass: float16 would underflow."""
    return np.dtype(np.float32 if logits_dtype == np.float16 else logits_dtype)


def _add(terms: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, terms)


def _tangents_of_elements(
    primals: dict[str, Array],
    tangents: dict[str, Array],
    element: Elements,
    divided: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """The tangents of loss and gradient for constant logits and divisor.

    The cross-entropy is linear in label, positive weight and weight, and the smoothed label,
    y (1 - s) + s / 2, is linear in label and smoothing. The coefficients of tangents are 0 for
    dropped elements, even if a divisor is NaN.
    """
    wide = element.logits.dtype
    loss, gradient = [], []

    def coefficient(values: Array) -> Array:
        return element.select(divided(values))

    smoothed = []
    if "labels" in tangents:
        smoothed.append(tangents["labels"] * (1 - primals["smoothing"]))
    if "smoothing" in tangents:
        label = element.select(primals["labels"].astype(wide))
        smoothed.append((0.5 - label) * tangents["smoothing"])
    if smoothed:
        of_loss, of_gradient = by_label(element)
        loss.append(coefficient(element.weighted(of_loss)) * _add(smoothed))
        gradient.append(coefficient(element.weighted(of_gradient)) * _add(smoothed))
    if "pos_weight" in tangents:
        of_loss, of_gradient = by_pos_weight(element)
        loss.append(coefficient(element.weighted(of_loss)) * tangents["pos_weight"])
        gradient.append(coefficient(element.weighted(of_gradient)) * tangents["pos_weight"])
    for name, other in (("weight", "sample_weight"), ("sample_weight", "weight")):
        if name in tangents:
            factor = element.select(primals[other].astype(wide)) if other in primals else None
            for terms, of_element in ((loss, element_loss), (gradient, element_gradient)):
                value = of_element(element)
                value = value if factor is None else times(factor, value)
                terms.append(coefficient(value) * tangents[name])
    return _add(loss), _add(gradient)


def _tangent_of_focal(
    primals: dict[str, Array],
    constant_power: bool,
    tangents: dict[str, Array],
    element: Elements,
    divided: Callable[[Array], Array],
    of_gradient: bool,
) -> Array:
    """The tangent of a focal loss, or of its gradient, for a constant divisor."""
    wide = element.logits.dtype
    fixed = {name: value for name, value in primals.items() if name != "ignore_label"}
    if element.keep is not None:  # which depends on the labels as they are stored
        fixed["where"] = element.keep

    def values(moving: dict[str, Array]) -> Array:
        given = fixed | moving
        inputs = elements(given["logits"], given["labels"], given["smoothing"], given)
        return inputs.weighted(formulas(focus_of(given, wide, constant_power))[of_gradient](inputs))

    moving = {name: primals[name].astype(wide) for name in tangents}
    tangent: Array
    _, tangent = jax.jvp(values, (moving,), (tangents,))
    # What multiplies a tangent may not depend on it.
    return element.select(divided(jnp.ones_like(element.logits))) * tangent


def _jvp_of_total(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    modifiers: tuple[str, ...],
    reduced_rank: int,
    count: int,
    **others: Any,
) -> tuple[list[Array], list[Array]]:
    """The sum is linear in each weight; its rounding error has no derivative."""
    common = {"modifiers": modifiers, "reduced_rank": reduced_rank, "count": count, **others}
    results = bce(*primals, kind="total", **common)
    logits, labels, scale, smoothing, *more = primals
    named = dict(zip(modifiers, more, strict=True))
    element = elements(logits, labels, smoothing, named)
    shape = jnp.broadcast_shapes(*(operand.shape for operand in primals))
    terms = []
    for name, dot in zip(modifiers, tangents[4:], strict=True):
        if isinstance(dot, ad.Zero) or name not in ("weight", "sample_weight"):
            continue
        rest = [named[n] for n in ("weight", "sample_weight") if n in named and n != name]
        factor = rest[0].astype(scale.dtype) if rest else jnp.ones_like(scale)
        # The tangent is selected, too: the cotangent may be infinite or NaN.
        terms.append(element.select(element.select(factor) * dot.astype(scale.dtype)))
    total_dot = jnp.broadcast_to(_add([jnp.zeros_like(scale), *terms]), shape)
    total_dot = sum_trailing(total_dot, reduced_rank)
    total_dot = divide(total_dot, scale, count, None, reduced_rank)
    return results, [total_dot, jnp.zeros_like(results[1])]


def _jvp_of_hessian(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[list[Array], list[Array]]:
    """The tangent of the Hessian is that of its formula; of the gradient, that of loss_and_grad."""
    primals = [primal if isinstance(primal, Array) else jnp.asarray(primal) for primal in primals]
    outputs = bce(*primals, kind="hess_and_grad", **params)
    is_zero = [isinstance(dot, ad.Zero) for dot in tangents]

    def hessian_of(*moving: Array) -> Array:
        values = iter(moving)
        operands = [p if zero else next(values) for p, zero in zip(primals, is_zero, strict=True)]
        given = params | {"kind": "hess_and_grad"}
        del given["implementation"], given["transposed"]
        return reference(*operands, **given)[0]

    _, hessian_dot = jax.jvp(
        hessian_of,
        [p for p, zero in zip(primals, is_zero, strict=True) if not zero],
        [dot for dot in tangents if not isinstance(dot, ad.Zero)],
    )
    floor = len(_OPERANDS) + params["modifiers"].index("hess_floor")
    names = tuple(name for name in params["modifiers"] if name != "hess_floor")
    rest = [i for i in range(len(primals)) if i != floor]
    if all(is_zero[i] for i in rest):
        return outputs, [hessian_dot, jnp.zeros_like(outputs[1])]
    _, (_, gradient_dot) = _jvp(
        [primals[i] for i in rest],
        [tangents[i] for i in rest],
        kind="loss_and_grad",
        **params | {"modifiers": names},
    )
    return outputs, [hessian_dot, jnp.broadcast_to(gradient_dot, outputs[1].shape)]


def _jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    gradient_dtype: np.dtype,
    **common: Any,
) -> tuple[list[Array], list[Array]]:
    if kind == "total":
        return _jvp_of_total(
            primals, tangents, modifiers=modifiers, reduced_rank=reduced_rank, **common
        )
    if kind == "hess_and_grad":
        return _jvp_of_hessian(
            primals,
            tangents,
            modifiers=modifiers,
            reduced_rank=reduced_rank,
            gradient_dtype=gradient_dtype,
            **common,
        )
    if kind == "grad":
        raise NotImplementedError(
            "jax_bce.loss(residuals='recompute') can be differentiated once, in reverse mode. "
            "Use residuals='gradient', the default, for other modes and higher derivatives."
        )
    # Primals may include Python numbers.
    primals = [primal if isinstance(primal, Array) else jnp.asarray(primal) for primal in primals]
    logits, _, scale, _ = primals[:4]
    wide = arithmetic_dtype(logits.dtype)
    common |= {"modifiers": modifiers, "reduced_rank": reduced_rank}
    named = dict(zip((*_OPERANDS, *modifiers), primals, strict=True))
    moving = {
        name: dot.astype(wide)
        for name, dot in zip(named, tangents, strict=True)
        if not isinstance(dot, ad.Zero)
    }
    logits_dot = moving.pop("logits", None)
    of_factor = {n: moving.pop(n) for n in ("scale", "divisor", "divisor_low") if n in moving}

    if kind == "loss" and logits_dot is None:
        (loss,) = outputs = bce(*primals, kind="loss", **common)
    else:
        dtype = gradient_dtype if kind == "loss_and_grad" else residual_dtype(logits.dtype)
        outputs = bce(*primals, kind="loss_and_grad", gradient_dtype=dtype, **common)
        loss, gradient = outputs

    divisor = named.get("divisor")
    divided = functools.partial(divide, scale=scale, count=common["count"], divisor=divisor)
    shape = jnp.broadcast_shapes(*(operand.shape for operand in primals))
    if moving or kind == "loss_and_grad":
        logits, labels, _, smoothing = primals[:4]
        # A scale or divisor of 0 drops all elements, even NaN.
        exists = scale != 0 if divisor is None else (scale != 0) & (divisor != 0)
        exists = exists & named["where"] if "where" in modifiers else exists
        given = {name: named[name] for name in modifiers}
        element = elements(logits, labels, smoothing, given | {"where": exists})
    is_focal = "gamma" in modifiers
    of_focal = functools.partial(_tangent_of_focal, named, common["constant_power"])
    terms = []
    if moving and is_focal:
        terms.append(of_focal(moving, element, divided, of_gradient=False))
    elif moving:
        loss_by_others, gradient_by_others = _tangents_of_elements(named, moving, element, divided)
        terms.append(loss_by_others)
    if logits_dot is not None:
        terms.append(gradient.astype(wide) * logits_dot)
    dots = []
    if terms:
        dots.append(sum_trailing(jnp.broadcast_to(_add(terms), shape), reduced_rank))
    # Uses the factor's relative change: an undivided sum may overflow.
    changes = []
    for name, dot in of_factor.items():
        base = named[name.removesuffix("_low")]
        changes.append((1 if name == "scale" else -1) * dot / jnp.where(base == 0, 1, base))
    if changes:
        change = _add(changes)
        dots.append(loss.astype(wide) * change.reshape(change.shape[: loss.ndim]))
    loss_dot = _add(dots).astype(loss.dtype)
    if kind == "loss":
        return [loss], [loss_dot]

    terms = []
    if is_focal and (moving or logits_dot is not None):
        moving |= {} if logits_dot is None else {"logits": logits_dot}
        terms.append(of_focal(moving, element, divided, of_gradient=True))
    elif logits_dot is not None:
        hessian = element.select(divided(element.weighted(element_hessian(element))))
        terms.append(hessian * logits_dot)
    if moving and not is_focal:
        terms.append(gradient_by_others)
    if changes:
        focus = focus_of(named, wide, common["constant_power"])
        _, gradient_of = formulas(focus)
        gradients = element.select(divided(element.weighted(gradient_of(element))))
        terms.append(gradients * _add(changes))
    gradient_dot = jnp.broadcast_to(_add(terms), shape).astype(gradient.dtype)
    return outputs, [loss_dot, gradient_dot]


ad.primitive_jvps[bce_p] = _jvp


Params = tuple[tuple[str, Any], ...]


@functools.partial(jax.jit, static_argnames="params")
def _taylor_terms(
    primals: Sequence[Array], series: Sequence[Sequence[Array]], params: Params
) -> list[list[Array]]:
    def at(t: Array) -> list[Array]:
        """The primitive, with the operands' series evaluated at t."""
        moved = [
            functools.reduce(lambda sum_, term: term + t * sum_, [*terms[::-1], primal])
            if jnp.issubdtype(primal.dtype, jnp.floating)
            else primal
            for primal, terms in zip(primals, series, strict=True)
        ]
        return bce(*moved, **dict(params))

    def slope(function: Callable[[Any], list[Array]], t: Any) -> Any:
        return jax.jvp(function, (t,), (1.0,))[1]

    derivative, terms = at, []
    for order in range(1, len(series[0]) + 1):
        derivative = functools.partial(slope, derivative)
        terms.append([value / math.factorial(order) for value in derivative(0.0)])
    return [list(of_result) for of_result in zip(*terms, strict=True)]


def _taylor(
    primals: Sequence[Array], series: Sequence[Sequence[Array]], **params: Any
) -> tuple[list[Array], list[list[Array]]]:
    """The rule for `jax.experimental.jet`, by nested use of the rule above.

    jet cannot use that rule itself, nor differentiate `_reference.py`, which uses jax.custom_jvp.
    """
    primals = [primal if isinstance(primal, Array) else jnp.asarray(primal) for primal in primals]
    return bce(*primals, **params), _taylor_terms(primals, series, tuple(params.items()))


if jet is not None:
    jet.jet_rules[bce_p] = _taylor


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def recompute(operands: tuple[Array, ...], params: Params) -> Array:
    """The loss; its backward pass reads the operands again instead of a stored gradient.

    `params` are the primitive's parameters, as pairs.
    """
    (loss,) = bce(*operands, kind="loss", **dict(params))
    return loss


def _recompute_forward(
    operands: tuple[Array, ...], params: Params
) -> tuple[Array, tuple[Array, ...]]:
    return recompute(operands, params), operands


def _recompute_backward(
    params: Params, operands: tuple[Array, ...], cotangent: Array
) -> tuple[tuple[Array | None, ...]]:
    logits, labels, scale, *others = operands
    common = dict(params)
    wide_cotangent = cotangent.astype(scale.dtype)
    factor = wide_cotangent.reshape(cotangent.shape + (1,) * common["reduced_rank"]) * scale
    (logits_bar,) = bce(logits, labels, factor, *others, kind="grad", **common)

    # Uses the rule above; XLA removes all of it if only the logits' cotangent is requested.
    names = (*_OPERANDS, *common["modifiers"])
    moving = [
        i
        for i, (name, operand) in enumerate(zip(names, operands, strict=True))
        if name not in ("logits", "scale", "ignore_label", "divisor_low")
        and jnp.issubdtype(operand.dtype, jnp.floating)
    ]

    def loss_of(*values: Array) -> Array:
        given = dict(zip(moving, values, strict=True))
        return bce(*(given.get(i, o) for i, o in enumerate(operands)), kind="loss", **common)[0]

    _, pullback = jax.vjp(loss_of, *(operands[i] for i in moving))
    bars = dict(zip(moving, pullback(cotangent), strict=True))
    bars[0] = spread_like(logits_bar, logits)
    return (tuple(bars.get(i) for i in range(len(operands))),)


recompute.defvjp(_recompute_forward, _recompute_backward)
