"""The losses of PyTorch and torchvision that this package has too, under their names.

They take JAX arrays, and import neither. A result has the input's dtype, reduced or not, as there.
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
      ValueError: target of another shape, be it a scalar; a weight that does not broadcast; a
        reduction that PyTorch does not have.
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
    r"""Binary cross-entropy of probabilities, called as ``torch.nn.functional``'s of this name.

    .. math:: l = -w \left(y \max(\log p, -100) + (1 - y) \max(\log(1 - p), -100)\right)

    Where p is a rounded sigmoid, the logit's tails are lost already: prefer
    `binary_cross_entropy_with_logits`.

    Differs from PyTorch on purpose: the gradient is that of the formula, 0 where a logarithm is
    clamped (PyTorch's is p - y divided by p (1 - p) or 1e-12, whichever is larger), a mean of no
    elements is 0 rather than NaN, the loss of a p outside [0, 1] is NaN (PyTorch raises), and
    target may be of any dtype that `jax_bce.loss` takes for labels. The deprecated size_average and
    reduce do not exist.

    Args:
      input: probabilities p in [0, 1]: float16, bfloat16, float32 or float64, any shape.
      target: of input's shape.
      weight: of each element, of a shape that broadcasts to input's.
      reduction: "mean", over the number of elements, whatever their weight; "sum" or "none".

    Returns:
      The loss in input's dtype.

    Derivatives:
      As `jax_bce.loss_from_probs` has them where no logarithm is clamped.

    Raises:
      TypeError, ValueError: as `binary_cross_entropy_with_logits` does.

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
        unlikely = p < 0.5  # the label whose logarithm may be clamped; the other's is next to 0
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
    """`binary_cross_entropy_with_logits` as an object, called as ``torch.nn``'s of this name.

    Args:
      weight: as for `binary_cross_entropy_with_logits`.
      reduction: as for `binary_cross_entropy_with_logits`.
      pos_weight: as for `binary_cross_entropy_with_logits`.

    Returns:
      Called with input and target, what `binary_cross_entropy_with_logits` does.

    Derivatives:
      As `binary_cross_entropy_with_logits` has them.

    Raises:
      ValueError: an unknown reduction; when called, as `binary_cross_entropy_with_logits` does.
      TypeError: when called, as `binary_cross_entropy_with_logits` does.

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
    """`binary_cross_entropy` as an object, called as ``torch.nn``'s of this name.

    Args:
      weight: as for `binary_cross_entropy`.
      reduction: as for `binary_cross_entropy`.

    Returns:
      Called with input and target, what `binary_cross_entropy` does.

    Derivatives:
      As `binary_cross_entropy` has them.

    Raises:
      ValueError: an unknown reduction; when called, as `binary_cross_entropy` does.
      TypeError: when called, as `binary_cross_entropy` does.

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
    """An error for an unknown reduction, or a batch that was passed instead of options."""
    if hasattr(reduction, "shape") or isinstance(reduction, list | tuple):
        raise TypeError(
            f"{name} is constructed first, and called with input and target then: "
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
    r"""Focal loss, called as ``torchvision.ops.sigmoid_focal_loss``.

    .. math:: l = \alpha_t (1 - p_t)^\gamma \left(y \log(1 + e^{-x})
        + (1 - y) \log(1 + e^{x})\right)

    with :math:`p_t = y \sigma(x) + (1 - y) \sigma(-x)` and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Differs from torchvision on purpose: the tails are exact (at (-20, 0) the loss is 8.76e-27,
    torchvision's 0), infinite logits have their limits, the gradient for a gamma below 1 is finite
    everywhere (torchvision's is NaN from ``|x| = 17`` on), a mean of no elements is 0, and an
    unknown reduction is an error.

    Args:
      inputs: as input of `binary_cross_entropy_with_logits`.
      targets: of inputs' shape.
      alpha: the weight of the positive class; below 0, or None, there is none, as long as alpha is
        not traced: a traced alpha is taken at its value.
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
    one_of("reduction", reduction, get_args(Reduction))
    x, y = _of_one_shape(inputs=inputs, targets=targets)
    weighted = alpha is not None and not _is_negative(alpha)
    with renamed(logits="inputs", labels="targets"):
        return focal_loss(
            x, y, alpha=alpha if weighted else None, gamma=gamma, reduction=reduction, dtype=x.dtype
        )


def _is_negative(alpha: ArrayLike) -> bool:
    """Whether this is a number below 0, which a traced one is not known to be."""
    number = known(typed("alpha", alpha))
    return number is not None and number.ndim == 0 and bool(number < 0)


def _of_one_shape(**operands: ArrayLike) -> tuple[AnyArray, AnyArray]:
    """Two arrays, or an error with the names that PyTorch gives them."""
    (one, x), (other, y) = ((name, operand(name, value)) for name, value in operands.items())
    if x.shape != y.shape:
        name = spelled(other, operands[other])
        hint = fixes_of_labels(name, y, x.shape, one)
        if not hint and x.size == y.size:
            hint = f"{name}.reshape({one}.shape) rearranges it"
        raise ValueError(
            f"{other} of shape {y.shape} does not match {one} of shape {x.shape}: "
            f"{hint or f'pass one number for each of {one}'}."
        )
    return x, y
