"""The losses of PyTorch and torchvision that this package has too, under their names.

They take JAX arrays, and import neither. A result has the input's dtype, reduced or not, as there.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_bce._loss import loss
from jax_bce._relatives import focal_loss


def binary_cross_entropy_with_logits(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    pos_weight: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy, called as ``torch.nn.functional.binary_cross_entropy_with_logits``.

    With :math:`w` for weight and :math:`q` for pos_weight, each element is

    .. math:: l = w \left(q y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})\right)

    Differs from PyTorch on purpose: the tails are exact (at (-20, 0) the loss is 2.06e-09,
    PyTorch's 0; at (20, 1) the gradient is -2.06e-09, PyTorch's 0), infinite logits have their
    limits, a mean of no elements is 0 rather than NaN, and target may be of any dtype that
    `jax_bce.loss` takes for labels. The deprecated size_average and reduce, which stand between
    weight and reduction in PyTorch, do not exist.

    Args:
      input: float16, bfloat16, float32 or float64, any shape.
      target: of input's shape.
      weight: of each element, of a shape that broadcasts to input's.
      reduction: "mean", over the number of elements, whatever their weight; "sum" or "none".
      pos_weight: multiplies the first term, of a shape that broadcasts to input's.

    Returns:
      The loss in input's dtype. A sum in float16 overflows beyond 65,504; `jax_bce.loss` returns
      float32.

    Derivatives:
      As `jax_bce.loss` has them, with respect to input, float target, weight and pos_weight.

    Raises:
      ValueError: target of another shape, be it a scalar; a weight that does not broadcast; an
        unknown reduction.
      TypeError: a dtype that `jax_bce.loss` does not take.

    Source:
      ``torch.nn.functional.binary_cross_entropy_with_logits`` of PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import binary_cross_entropy_with_logits
      >>> x, y = jnp.array([[0.0, 2.0], [-1.0, 3.0]]), jnp.array([[1, 0], [0, 1]])
      >>> print(binary_cross_entropy_with_logits(x, y, pos_weight=jnp.array([2.0, 1.0])))
      0.9687679
    """
    x, y = _of_one_shape(input=input, target=target)
    return loss(x, y, weight=weight, pos_weight=pos_weight, reduction=reduction, dtype=x.dtype)


def sigmoid_focal_loss(
    inputs: ArrayLike,
    targets: ArrayLike,
    alpha: float | Array = 0.25,
    gamma: ArrayLike = 2,
    reduction: str = "none",
) -> Array:
    r"""Focal loss, called as ``torchvision.ops.sigmoid_focal_loss``.

    .. math:: l = \alpha_t (1 - p_t)^\gamma \left(y \log(1 + e^{-x})
        + (1 - y) \log(1 + e^{x})\right)

    with :math:`p_t = y \sigma(x) + (1 - y) \sigma(-x)` and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Differs from torchvision on purpose: the tails are exact (at (-20, 0) the loss is 8.76e-27,
    torchvision's 0), infinite logits have their limits, the gradient for a gamma below 1 is finite
    everywhere (torchvision's is NaN from |x| = 17 on), a mean of no elements is 0, and an unknown
    reduction is an error.

    Args:
      inputs: as input of `binary_cross_entropy_with_logits`.
      targets: of inputs' shape.
      alpha: the weight of the positive class; below 0 there is none, as long as alpha is not
        traced: a traced alpha is taken at its value.
      gamma: the exponent; 0 leaves the binary cross-entropy.
      reduction: "none", "mean" or "sum".

    Returns:
      The loss in inputs' dtype.

    Derivatives:
      As `jax_bce.focal_loss` has them.

    Raises:
      TypeError, ValueError: as `binary_cross_entropy_with_logits` does.

    Source:
      ``torchvision.ops.sigmoid_focal_loss``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import sigmoid_focal_loss
      >>> print(sigmoid_focal_loss(jnp.array([0.0, 2.0]), jnp.array([1, 0])).round(4))
      [0.0433 1.2376]
    """
    x, y = _of_one_shape(inputs=inputs, targets=targets)
    weighted = isinstance(alpha, jax.core.Tracer) or alpha >= 0
    return focal_loss(
        x, y, alpha=alpha if weighted else None, gamma=gamma, reduction=reduction, dtype=x.dtype
    )


def _of_one_shape(**operands: ArrayLike) -> tuple[Array, Array]:
    """Two arrays, or an error with the names that PyTorch gives them."""
    (one, x), (other, y) = ((name, jnp.asarray(value)) for name, value in operands.items())
    if x.shape != y.shape:
        raise ValueError(
            f"{other} of shape {y.shape} does not match {one} of shape {x.shape}: "
            f"jnp.broadcast_to({other}, {one}.shape) repeats it, {other}.reshape({one}.shape) "
            "rearranges it."
        )
    return x, y
