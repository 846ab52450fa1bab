"""The public functions: each one call of the primitive."""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_bce._arguments import one_of, prepare
from jax_bce._derivatives import recompute
from jax_bce._primitive import bce, spread_like


def loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    reduction: str = "mean",
    axis: int | Sequence[int] | None = None,
    label_smoothing: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
    residuals: str = "gradient",
    implementation: str | None = None,
) -> Array:
    r"""Binary cross-entropy between labels and the sigmoid of logits.

    For a logit :math:`x` and a label :math:`y`, each element is

    .. math:: l = y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x}),

    the negative log-likelihood in nats of a Bernoulli variable with probability
    :math:`\sigma(x) = 1 / (1 + e^{-x})`. Pass the raw scores of the model: a sigmoid in front of
    this function loses what it computes.

    Args:
      logits: float16, bfloat16, float32 or float64, any shape.
      labels: probabilities of the positive class, of the logits' shape or a scalar: any of the
        logits' dtypes (not necessarily the same), bool, int8, uint8, int16, int32 or int64. Read as
        stored; integers other than 0 and 1 are taken at their value: labels of -1 and 1, or of 0
        and 255, are not what you want.
      reduction: "mean", "sum" or "none". Sums are accumulated beyond float32. Without any element,
        the loss is 0.
      axis: the axes to reduce; None reduces all. Trailing axes are read in place, others are
        transposed first.
      label_smoothing: s in [0, 1], which is checked unless it is traced; a label y becomes
        y (1 - s) + s / 2, and neither that nor its complement is rounded before it is used.
      dtype: of the result. None: float32 (float64 for float64 logits) for a reduced loss, the
        logits' dtype for reduction="none".
      residuals: what is kept for the backward pass. "gradient": the gradient, computed together
        with the loss in one pass over memory. "recompute": nothing but logits and labels
        themselves; the backward pass reads them again, which allows reverse mode only, and once.
      implementation: None, the fastest that was measured (the SIMD kernel on a CPU, XLA elsewhere);
        "cpu", the SIMD kernel; "cuda", the GPU kernel; "xla", plain JAX, which is also what
        ``jax.export`` stores unless a kernel is named. Like reduction, axis, dtype and residuals,
        it is static under jit.

    Returns:
      The loss, of the logits' shape without the reduced axes.

    Derivatives:
      With respect to logits, float labels and label_smoothing, to any order, in forward and reverse
      mode, in their argument's dtype; ``dl/dx = (1 - y) sigmoid(x) - y sigmoid(-x)``. float32
      losses and gradients are within 1 ulp of the exact value for every logit and labels 0 and 1:
      neither has a floor, neither is rounded to zero in the tails. An infinite logit gives the
      limit (0, or an infinite loss with a finite gradient), NaN gives NaN. XLA's own arithmetic
      (``implementation="xla"``) flushes subnormal results to zero.

    Several devices:
      Operands that are spread over a mesh stay there: each device evaluates its own elements. XLA
      may gather them where a summed dimension is spread and does not divide evenly, or logits and
      labels are spread over one dimension in different ways, or more than 4,096 rows into parts of
      fewer than 32 elements. In a shard_map the loss is that of the shard.

    Raises:
      TypeError: logits that are not floating-point, or another dtype that is not listed here.
      ValueError: labels of another shape, or spread differently over an explicit mesh, operands in
        the host's memory, an unknown option, an axis out of range.
      RuntimeError: an implementation that is not available, with the reason and the remedy.

    Source:
      The derivation stands in ``csrc/bce_math.h``.

    Example:
      >>> import jax, jax.numpy as jnp, jax_bce
      >>> logits, labels = jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 0])
      >>> print(jax_bce.loss(logits, labels, reduction="none"))
      [2.0611537e-09 6.9314718e-01 2.0000000e+01]
      >>> value, gradient = jax.value_and_grad(jax_bce.loss)(logits, labels)
      >>> print(value, gradient)
      6.8977156 [ 6.8705125e-10 -1.6666667e-01  3.3333334e-01]
    """
    one_of("residuals", residuals, ("gradient", "recompute"))
    call = prepare(logits, labels, reduction, axis, label_smoothing, dtype, implementation)
    if residuals == "recompute":
        result = recompute(*call.operands, tuple(call.params.items()))
    else:
        (result,) = bce(*call.operands, kind="loss", **call.params)
    return result.astype(call.result_dtype)


def loss_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    reduction: str = "mean",
    axis: int | Sequence[int] | None = None,
    label_smoothing: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The loss and its derivative with respect to the logits, in one pass over memory.

    The same as ``jax.value_and_grad(loss)`` without tracing a derivative; for a loss that is not
    reduced to one number, the gradient of its sum.

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      reduction: as for `loss`.
      axis: as for `loss`.
      label_smoothing: as for `loss`.
      dtype: of the loss, as for `loss`.
      implementation: as for `loss`.

    Returns:
      The loss as `loss` returns it, and the gradient in the logits' shape and dtype. With
      ``reduction="mean"`` the gradient holds the factor 1/N; in float16 a long mean underflows.

    Raises:
      TypeError, ValueError, RuntimeError: as `loss` does.

    Source:
      The derivation stands in ``csrc/bce_math.h``.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> value, gradient = jax_bce.loss_and_grad(jnp.array([-20.0, 20.0]), 0, reduction="sum")
      >>> print(value, gradient)
      20.0 [2.0611537e-09 1.0000000e+00]
    """
    call = prepare(logits, labels, reduction, axis, label_smoothing, dtype, implementation)
    value, gradient = bce(*call.operands, kind="loss_and_grad", **call.params)
    gradient = call.in_place(spread_like(gradient, call.operands[0]))
    return value.astype(call.result_dtype), gradient
