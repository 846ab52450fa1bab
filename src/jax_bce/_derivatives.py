"""The derivative rules of the primitive, and the memory-lean `recompute`.

The kind "loss" is differentiated into "loss_and_grad", whose gradient is the only residual, and
"loss_and_grad" into plain jnp. The rule is the primitive's own, so that every mode and nesting of
differentiation passes through it.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad

from jax_bce._primitive import bce, bce_p, spread_like
from jax_bce._reference import arithmetic_dtype, element_hessian, sum_trailing


def residual_dtype(logits_dtype: np.dtype) -> np.dtype:
    """The dtype of a gradient that waits for its cotangent: float16 would underflow first."""
    return np.dtype(np.float32 if logits_dtype == np.float16 else logits_dtype)


def _label_tangent(labels: Array, smoothing: Array, labels_dot: Any, smoothing_dot: Any) -> Any:
    """The tangent of y (1 - s) + s / 2, or None if neither moves."""
    terms = []
    if not isinstance(labels_dot, ad.Zero):
        terms.append(labels_dot.astype(smoothing.dtype) * (1 - smoothing))
    if not isinstance(smoothing_dot, ad.Zero):
        terms.append((0.5 - labels.astype(smoothing.dtype)) * smoothing_dot)
    return functools.reduce(operator.add, terms) if terms else None


def _jvp(
    primals: tuple[Array, Array, Array, Array],
    tangents: tuple[Any, Any, Any, Any],
    *,
    kind: str,
    reduced_rank: int,
    gradient_dtype: np.dtype,
    **common: Any,
) -> tuple[list[Array], list[Array]]:
    logits, labels, scale, smoothing = primals
    logits_dot, labels_dot, scale_dot, smoothing_dot = tangents
    if kind == "grad":
        raise NotImplementedError(
            "jax_bce.loss(residuals='recompute') can be differentiated once, in reverse mode. "
            "Use residuals='gradient', the default, for other modes and higher derivatives."
        )
    assert isinstance(scale_dot, ad.Zero)  # a constant in every call
    common["reduced_rank"] = reduced_rank
    logits_move = not isinstance(logits_dot, ad.Zero)

    if kind == "loss" and not logits_move:
        (loss,) = outputs = bce(*primals, kind="loss", **common)
    else:
        dtype = gradient_dtype if kind == "loss_and_grad" else residual_dtype(logits.dtype)
        outputs = bce(*primals, kind="loss_and_grad", gradient_dtype=dtype, **common)
        loss, gradient = outputs

    # d loss / dx = gradient, d loss / dy = log(1 + exp(-x)) - log(1 + exp(x)) = -x.
    wide = arithmetic_dtype(logits.dtype)
    factor = scale * scale.dtype.type(1 / common["count"])
    label_dot = _label_tangent(labels, smoothing, labels_dot, smoothing_dot)
    shape = jnp.broadcast_shapes(*(operand.shape for operand in primals))
    terms = []
    if logits_move:
        terms.append(gradient.astype(wide) * logits_dot.astype(wide))
    if label_dot is not None:
        terms.append(-logits.astype(wide) * label_dot * factor)
    loss_dot = sum_trailing(jnp.broadcast_to(sum(terms), shape), reduced_rank).astype(loss.dtype)
    if kind == "loss":
        return [loss], [loss_dot]

    terms = []
    if logits_move:
        terms.append(element_hessian(logits) * logits_dot.astype(wide) * factor)
    if label_dot is not None:
        terms.append(-label_dot * factor)
    gradient_dot = jnp.broadcast_to(sum(terms), shape).astype(gradient.dtype)
    return outputs, [loss_dot, gradient_dot]


ad.primitive_jvps[bce_p] = _jvp

Params = tuple[tuple[str, Any], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recompute(
    logits: Array, labels: Array, scale: Array, smoothing: Array, params: Params
) -> Array:
    """The loss, whose backward pass reads logits and labels again instead of a stored gradient.

    `params` are the primitive's, as pairs. `scale` is a constant here: its cotangent is zero.
    """
    (loss,) = bce(logits, labels, scale, smoothing, kind="loss", **dict(params))
    return loss


def _recompute_forward(
    logits: Array, labels: Array, scale: Array, smoothing: Array, params: Params
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    operands = (logits, labels, scale, smoothing)
    return recompute(*operands, params), operands


def _recompute_backward(
    params: Params, operands: tuple[Array, Array, Array, Array], cotangent: Array
) -> tuple[Array, Array | None, None, Array]:
    logits, labels, scale, smoothing = operands
    common = dict(params)
    cotangent = cotangent.astype(scale.dtype)
    weight = cotangent.reshape(cotangent.shape + (1,) * common["reduced_rank"]) * scale
    (logits_bar,) = bce(logits, labels, weight, smoothing, kind="grad", **common)
    logits_bar = spread_like(logits_bar, logits)

    # The smoothed labels' cotangent. It is not multiplied by a tangent of zero, which would be NaN
    # where a logit is infinite.
    smoothed_bar = -logits.astype(scale.dtype) * (weight * scale.dtype.type(1 / common["count"]))
    float_labels = jnp.issubdtype(labels.dtype, jnp.floating)

    def tangent(labels_dot: Any, smoothing_dot: Array) -> Any:
        label_dot = _label_tangent(labels, smoothing, labels_dot, smoothing_dot)
        return label_dot + jnp.zeros_like(smoothed_bar)  # in its shape, and spread as it is

    zero = ad.Zero(jax.typeof(labels).to_tangent_aval())
    moving = tangent if float_labels else functools.partial(tangent, zero)
    arguments = (labels, smoothing) if float_labels else (smoothing,)
    zeros, pullback = jax.vjp(moving, *map(jnp.zeros_like, arguments))
    *labels_bar, smoothing_bar = pullback(zeros + smoothed_bar)
    return logits_bar, labels_bar[0] if labels_bar else None, None, smoothing_bar


recompute.defvjp(_recompute_forward, _recompute_backward)
