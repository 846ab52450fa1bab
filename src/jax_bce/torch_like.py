"""Drop-in replacements for the binary losses of PyTorch and torchvision, with the same names.

They take JAX arrays and import neither library. As in PyTorch, results have the input's dtype.
"""

from __future__ import annotations  # help() shows names, not the Union behind them

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_bce._alignment import fixes_of_labels, spelled
from jax_bce._arguments import one_of
from jax_bce._callers import renamed
from jax_bce._loss import loss
from jax_bce._operands import AnyArray, known, operand, typed
from jax_bce._relatives import focal_loss, loss_from_probs

Reduction = Literal["none", "mean", "sum"]


def binary_cross_entropy_with_logits(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    pos_weight: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy, like ``torch.nn.functional.binary_cross_entropy_with_logits``.

    With weight :math:`w` and pos_weight :math:`q`, the loss of each element is

    .. math:: l = w \left(q y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})\right)

    Deliberate differences from PyTorch: the tails are exact (at (-20, 0) the loss is 2.06e-09,
    PyTorch's is 0; at (20, 1) the gradient is -2.06e-09, PyTorch's is 0), infinite logits give the
    limits, a mean of no elements is 0 rather than NaN, and target may have any dtype that
    `jax_bce.loss` accepts for labels. The deprecated size_average and reduce, which come between
    weight and reduction in PyTorch, are not supported.

    Args:
      input: float16, bfloat16, float32 or float64, any shape.
      target: labels with input's shape.
      weight: a factor for each element; its shape broadcasts to input's.
      reduction: "mean" divides by the number of elements, whatever their weight; "sum" or "none".
      pos_weight: multiplies the first term; its shape broadcasts to input's.

    Returns:
      The loss in input's dtype. A float16 sum overflows beyond 65,504; `jax_bce.loss` returns
      float32.

    Derivatives:
      As for `jax_bce.loss`, with respect to input, float target, weight and pos_weight.

    Raises:
      ValueError: if target has another shape, even a scalar; if a weight does not broadcast; or if
        PyTorch does not have the reduction.
      TypeError: if `jax_bce.loss` does not accept a dtype.

    Source:
      ``torch.nn.functional.binary_cross_entropy_with_logits`` of PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import binary_cross_entropy_with_logits
      >>> x, y = jnp.array([[0.0, 2.0], [-1.0, 3.0]]), jnp.array([[1, 0], [0, 1]])
      >>> print(binary_cross_entropy_with_logits(x, y, pos_weight=jnp.array([2.0, 1.0])))
      0.9687679
    """
    one_of("reduction", reduction, get_args(Reduction))
    x, y = _of_one_shape(input=input, target=target)
    with renamed(logits="input", labels="target"):
        return loss(x, y, weight=weight, pos_weight=pos_weight, reduction=reduction, dtype=x.dtype)


def binary_cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy of probabilities, like ``torch.nn.functional.binary_cross_entropy``.

    .. math:: l = -w \left(y \max(\log p, -100) + (1 - y) \max(\log(1 - p), -100)\right)

    A rounded sigmoid has already lost the logit's tails: prefer `binary_cross_entropy_with_logits`.

    Deliberate differences from PyTorch: the gradient is that of the formula, 0 if a logarithm is
    clamped (PyTorch's is p - y divided by p (1 - p) or 1e-12, whichever is larger), a mean of no
    elements is 0 rather than NaN, the loss is NaN if p is outside [0, 1] (PyTorch raises), and
    target may have any dtype that `jax_bce.loss` accepts for labels. The deprecated size_average
    and reduce are not supported.

    Args:
      input: probabilities p in [0, 1]: float16, bfloat16, float32 or float64, any shape.
      target: labels with input's shape.
      weight: a factor for each element; its shape broadcasts to input's.
      reduction: "mean" divides by the number of elements, whatever their weight; "sum" or "none".

    Returns:
      The loss in input's dtype.

    Derivatives:
      As for `jax_bce.loss_from_probs` if no logarithm is clamped.

    Raises:
      TypeError, ValueError: as for `binary_cross_entropy_with_logits`.

    Source:
      ``torch.nn.functional.binary_cross_entropy`` of PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import binary_cross_entropy
      >>> p, y = jnp.array([0.5, 0.25, 0.0, 0.0]), jnp.array([1, 0, 0, 1])
      >>> print(binary_cross_entropy(p, y, reduction="none"))
      [  0.6931472    0.28768206   0.         100.        ]
    """
    one_of("reduction", reduction, get_args(Reduction))
    p, y = _of_one_shape(input=input, target=target)
    wide = jnp.promote_types(p.dtype, jnp.float32)
    with renamed(logits="input", probs="input", labels="target"):
        unlikely = p < 0.5  # the label whose logarithm may be clamped; the other's is close to 0
        clamped = loss_from_probs(jax.lax.stop_gradient(p), unlikely, reduction="none") >= 100
        inside = jnp.where(clamped, 0.5, p)
        losses = loss_from_probs(inside, y, weight=weight, reduction="none", dtype=wide)
    floor = 100 * jnp.where(unlikely, y, 1 - y.astype(wide))
    losses = jnp.where(clamped, floor if weight is None else floor * jnp.asarray(weight), losses)
    if reduction != "none":
        losses = jnp.sum(losses) / (max(1, losses.size) if reduction == "mean" else 1)
    return losses.astype(p.dtype)


@dataclass(eq=False)
class BCEWithLogitsLoss:
    """`binary_cross_entropy_with_logits` as an object, like ``torch.nn.BCEWithLogitsLoss``.

    Args:
      weight: as for `binary_cross_entropy_with_logits`.
      reduction: as for `binary_cross_entropy_with_logits`.
      pos_weight: as for `binary_cross_entropy_with_logits`.

    Returns:
      When called with input and target, as for `binary_cross_entropy_with_logits`.

    Derivatives:
      As for `binary_cross_entropy_with_logits`.

    Raises:
      ValueError: if the reduction is unknown; when called, as for
        `binary_cross_entropy_with_logits`.
      TypeError: when called, as for `binary_cross_entropy_with_logits`.

    Source:
      ``torch.nn.BCEWithLogitsLoss`` of PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import BCEWithLogitsLoss
      >>> criterion = BCEWithLogitsLoss(pos_weight=jnp.array([2.0, 1.0]))
      >>> print(criterion(jnp.array([[0.0, 2.0], [-1.0, 3.0]]), jnp.array([[1, 0], [0, 1]])))
      0.9687679
    """

    weight: ArrayLike | None = None
    reduction: Reduction = "mean"
    pos_weight: ArrayLike | None = None

    def __post_init__(self) -> None:
        """Checks at once what PyTorch checks with the first batch."""
        _constructed(type(self).__name__, self.reduction)

    def __call__(self, input: ArrayLike, target: ArrayLike) -> Array:
        """The loss of a batch."""
        return binary_cross_entropy_with_logits(
            input, target, self.weight, self.reduction, self.pos_weight
        )


@dataclass(eq=False)
class BCELoss:
    """`binary_cross_entropy` as an object, like ``torch.nn.BCELoss``.

    Args:
      weight: as for `binary_cross_entropy`.
      reduction: as for `binary_cross_entropy`.

    Returns:
      When called with input and target, as for `binary_cross_entropy`.

    Derivatives:
      As for `binary_cross_entropy`.

    Raises:
      ValueError: if the reduction is unknown; when called, as for `binary_cross_entropy`.
      TypeError: when called, as for `binary_cross_entropy`.

    Source:
      ``torch.nn.BCELoss`` of PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import BCELoss
      >>> print(BCELoss(reduction="sum")(jnp.array([0.5, 0.0]), jnp.array([1, 1])))
      100.693146
    """

    weight: ArrayLike | None = None
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Checks at once what PyTorch checks with the first batch."""
        _constructed(type(self).__name__, self.reduction)

    def __call__(self, input: ArrayLike, target: ArrayLike) -> Array:
        """The loss of a batch."""
        return binary_cross_entropy(input, target, self.weight, self.reduction)


def _constructed(name: str, reduction: object) -> None:
    """Raises if the reduction is unknown, or if a batch was passed instead of options."""
    if hasattr(reduction, "shape") or isinstance(reduction, list | tuple):
        raise TypeError(
            f"{name} must be constructed before it is called with input and target: "
            f"{name}()(input, target)."
        )
    one_of("reduction", reduction, get_args(Reduction))


def sigmoid_focal_loss(
    inputs: ArrayLike,
    targets: ArrayLike,
    alpha: ArrayLike | None = 0.25,
    gamma: ArrayLike = 2,
    reduction: Reduction = "none",
) -> Array:
    r"""Focal loss, like ``torchvision.ops.sigmoid_focal_loss``.

    .. math:: l = \alpha_t (1 - p_t)^\gamma \left(y \log(1 + e^{-x})
        + (1 - y) \log(1 + e^{x})\right)

    with :math:`p_t = y \sigma(x) + (1 - y) \sigma(-x)` and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Deliberate differences from torchvision: the tails are exact (at (-20, 0) the loss is 8.76e-27,
    torchvision's is 0), infinite logits give the limits, the gradient for gamma below 1 is finite
    everywhere (torchvision's is NaN from ``|x| = 17`` on), a mean of no elements is 0, and an
    unknown reduction is an error.

    Args:
      inputs: like input of `binary_cross_entropy_with_logits`.
      targets: labels with inputs' shape.
      alpha: the weight of the positive class. If None or negative, neither class is weighted. A
        traced alpha is always used as it is.
      gamma: the exponent; 0 gives the binary cross-entropy.
      reduction: "none", "mean" or "sum".

    Returns:
      The loss in inputs' dtype.

    Derivatives:
      As for `jax_bce.focal_loss`.

    Raises:
      TypeError, ValueError: as for `binary_cross_entropy_with_logits`.

    Source:
      ``torchvision.ops.sigmoid_focal_loss``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.torch_like import sigmoid_focal_loss
      >>> print(sigmoid_focal_loss(jnp.array([0.0, 2.0]), jnp.array([1, 0])).round(4))
      [0.0433 1.2376]
    """
    one_of("reduction", reduction, get_args(Reduction))
    x, y = _of_one_shape(inputs=inputs, targets=targets)
    weighted = alpha is not None and not _is_negative(alpha)
    with renamed(logits="inputs", labels="targets"):
        return focal_loss(
            x, y, alpha=alpha if weighted else None, gamma=gamma, reduction=reduction, dtype=x.dtype
        )


def _is_negative(alpha: ArrayLike) -> bool:
    """Whether this is a number below 0; False for a traced number, whose value is unknown."""
    number = known(typed("alpha", alpha))
    return number is not None and number.ndim == 0 and bool(number < 0)


def _of_one_shape(**operands: ArrayLike) -> tuple[AnyArray, AnyArray]:
    """Returns two arrays of one shape; errors use PyTorch's names of the arguments."""
    (one, x), (other, y) = ((name, operand(name, value)) for name, value in operands.items())
    if x.shape != y.shape:
        name = spelled(other, operands[other])
        hint = fixes_of_labels(name, y, x.shape, one)
        if not hint and x.size == y.size:
            hint = f"use {name}.reshape({one}.shape) if the order of its elements is right"
        raise ValueError(
            f"{other} of shape {y.shape} does not match {one} of shape {x.shape}: "
            f"{hint or f'pass one number for each element of {one}'}."
        )
    return x, y
