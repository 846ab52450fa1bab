"""The derivative rules of the primitive, and the memory-lean `recompute`.

The kind "loss" is differentiated into "loss_and_grad", whose gradient is the only residual, and
"loss_and_grad" into plain jnp. The rule is the primitive's own, so that every mode and nesting of
differentiation passes through it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad

from jax_bce._primitive import bce, bce_p
from jax_bce._reference import (
    arithmetic_dtype,
    element_gradient,
    element_hessian,
    sum_trailing,
)


def residual_dtype(logits_dtype: np.dtype) -> np.dtype:
    """The dtype of a gradient that waits for its cotangent: float16 would underflow first."""
    return np.dtype(np.float32 if logits_dtype == np.float16 else logits_dtype)


def _label_term(logits: Array, labels_dot: Array, scale: Array, count: int) -> Array:
    """d loss / dy = log(1 + exp(-x)) - log(1 + exp(x)) = -x."""
    wide = scale.dtype
    return -logits.astype(wide) * labels_dot.astype(wide) * (scale / count)


def _jvp(
    primals: tuple[Array, Array, Array],
    tangents: tuple[Any, Any, Any],
    *,
    kind: str,
    reduced_rank: int,
    gradient_dtype: np.dtype,
    **common: Any,
) -> tuple[list[Array], list[Array]]:
    logits, labels, scale = primals
    logits_dot, labels_dot, scale_dot = tangents
    count = common["count"]
    common["reduced_rank"] = reduced_rank
    if kind == "grad":
        raise NotImplementedError(
            "jax_bce.loss(residuals='recompute') can be differentiated once, in reverse mode. "
            "Use residuals='gradient', the default, for other modes and higher derivatives."
        )
    moving = [not isinstance(dot, ad.Zero) for dot in tangents]
    logits_move, labels_move, scale_moves = moving

    if kind == "loss" and not logits_move:
        (loss,) = outputs = bce(logits, labels, scale, kind="loss", **common)
    else:
        dtype = gradient_dtype if kind == "loss_and_grad" else residual_dtype(logits.dtype)
        outputs = bce(
            logits,
            labels,
            scale,
            kind="loss_and_grad",
            gradient_dtype=dtype,
            **common,
        )
        loss, gradient = outputs

    wide = arithmetic_dtype(logits.dtype)
    terms = []
    if logits_move:
        terms.append(gradient.astype(wide) * logits_dot.astype(wide))
    if labels_move:
        terms.append(_label_term(logits, labels_dot, scale, count))
    shape = jnp.broadcast_shapes(logits.shape, labels.shape, scale.shape)
    loss_dot = sum_trailing(jnp.broadcast_to(sum(terms, jnp.zeros((), wide)), shape), reduced_rank)
    if scale_moves:
        (unscaled,) = bce(logits, labels, jnp.ones_like(scale), kind="loss", **common)
        shape_of_loss = scale.shape[: scale.ndim - reduced_rank]
        loss_dot += unscaled.astype(wide) * scale_dot.reshape(shape_of_loss)
    loss_dot = loss_dot.astype(loss.dtype)
    if kind == "loss":
        return [loss], [loss_dot]

    terms = []
    if logits_move:
        terms.append(element_hessian(logits) * logits_dot.astype(wide) * (scale / count))
    if labels_move:
        terms.append(-labels_dot.astype(wide) * (scale / count))
    if scale_moves:
        terms.append(element_gradient(logits, labels) * (scale_dot / count))
    gradient_dot = jnp.broadcast_to(sum(terms, jnp.zeros((), wide)), shape)
    return outputs, [loss_dot, gradient_dot.astype(gradient.dtype)]


ad.primitive_jvps[bce_p] = _jvp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def recompute(
    logits: Array, labels: Array, scale: Array, params: tuple[tuple[str, Any], ...]
) -> Array:
    """The loss, whose backward pass reads logits and labels again instead of a stored gradient.

    `params` are the primitive's, as pairs. `scale` is a constant here: its cotangent is zero.
    """
    (loss,) = bce(logits, labels, scale, kind="loss", **dict(params))
    return loss


def _recompute_forward(
    logits: Array, labels: Array, scale: Array, params: tuple[tuple[str, Any], ...]
) -> tuple[Array, tuple[Array, Array, Array]]:
    return recompute(logits, labels, scale, params), (logits, labels, scale)


def _recompute_backward(
    params: tuple[tuple[str, Any], ...], operands: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array | None, None]:
    logits, labels, scale = operands
    common = dict(params)
    cotangent = cotangent.astype(scale.dtype)
    weight = cotangent.reshape(cotangent.shape + (1,) * common["reduced_rank"]) * scale
    (logits_bar,) = bce(logits, labels, weight, kind="grad", **common)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return logits_bar, None, None
    term = functools.partial(_label_term, logits, scale=weight, count=common["count"])
    total, pullback = jax.vjp(lambda dot: jnp.sum(term(dot)), jnp.zeros_like(labels))
    (labels_bar,) = pullback(jnp.ones_like(total))
    return logits_bar, labels_bar, None


recompute.defvjp(_recompute_forward, _recompute_backward)
