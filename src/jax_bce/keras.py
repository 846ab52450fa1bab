"""The binary cross-entropies of Keras 3 on JAX, with Keras's names and defaults.

Importing this module imports Keras, and registers the losses so that saved models can be loaded.
Element losses come from the package. Weights, masks and reductions are implemented here, because
Keras multiplies by the mask, which leaves NaN in masked elements.
"""

from __future__ import annotations  # help() shows names, not the Union behind them

import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jax_bce
from jax_bce._callers import caller, renamed
from jax_bce._operands import ranged, unwrapped

_REMEDY = "set KERAS_BACKEND=jax in the environment before Keras is imported for the first time."
try:
    import keras  # type: ignore  # has no annotations and may be missing
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ImportError("jax_bce.keras needs Keras: pip install keras") from error
    if error.name in ("tensorflow", "torch"):
        raise RuntimeError(f"Keras looks for {error.name} instead of JAX: {_REMEDY}") from error
    raise
if keras.config.backend() != "jax":
    raise RuntimeError(f"Keras runs on {keras.config.backend()} instead of JAX: {_REMEDY}")

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "binary_crossentropy",
    "binary_focal_crossentropy",
]

_NAMES = {"logits": "y_pred", "probs": "y_pred", "labels": "y_true"}


def binary_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    label_smoothing: ArrayLike = 0.0,
    axis: int | Sequence[int] | None = -1,
) -> Array:
    r"""Mean binary cross-entropy over an axis, with the signature of the Keras function.

    For a label :math:`y` and a probability :math:`p`, which is clipped to [1e-7, 1 - 1e-7] (see
    ``keras.config.epsilon()``), or is the sigmoid of a logit, not clipped, each element is

    .. math:: l = -y \log p - (1 - y) \log(1 - p)

    Deliberate differences from Keras: an infinite logit gives the limit (Keras: NaN), labels are
    read as stored (Keras first rounds them to y_pred's dtype), 16-bit elements are evaluated and
    averaged in float32 (Keras: NaN at a probability of 1), and a label_smoothing outside [0, 1]
    is an error.

    Args:
      y_true: labels with y_pred's shape; any dtype that `jax_bce.loss` accepts for labels.
      y_pred: probabilities or logits: float16, bfloat16, float32 or float64. Other dtypes are
        converted to Keras's floatx.
      from_logits: whether y_pred contains logits. The gradient of a clipped probability is 0, even
        if the prediction is wrong: False warns about this once per process.
      label_smoothing: s in [0, 1]; a label y becomes y (1 - s) + s / 2.
      axis: the axes to average; None averages all.

    Returns:
      The loss in y_pred's dtype, with its shape without the averaged axes.

    Derivatives:
      As for `jax_bce.loss` or `jax_bce.loss_from_probs`.

    Raises:
      ValueError: if y_true has another shape and is not a scalar, or an axis is out of range.
      TypeError: if `jax_bce.loss` does not accept a dtype.

    Source:
      ``keras.losses.binary_crossentropy`` of Keras 3.

    Example:
      >>> from jax_bce.keras import binary_crossentropy
      >>> print(binary_crossentropy([[0, 1], [1, 1]], [[-20.0, 0.0], [1.0, -90.0]], True))
      [ 0.3465736 45.15663  ]
    """
    y, x, keywords = _arguments(y_true, y_pred, label_smoothing, axis)
    with renamed(**_NAMES):
        if from_logits:
            return jax_bce.loss(x, y, **keywords)
        _warn_of_probabilities()
        return jax_bce.loss_from_probs(x, y, epsilon=keras.config.epsilon(), **keywords)


def binary_focal_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    apply_class_balancing: bool = False,
    alpha: ArrayLike = 0.25,
    gamma: ArrayLike = 2.0,
    from_logits: bool = False,
    label_smoothing: ArrayLike = 0.0,
    axis: int | Sequence[int] | None = -1,
) -> Array:
    r"""Mean focal loss over an axis, with the signature of the Keras function.

    .. math:: l = -\alpha_t (1 - p_t)^\gamma (y \log p + (1 - y) \log(1 - p))

    with :math:`p_t = y p + (1 - y)(1 - p)`. :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)` if
    apply_class_balancing is True, else 1.

    Deliberate differences from Keras: those of `binary_crossentropy`. Also, Keras converts logits
    to probabilities, and its gradient is 0 beyond 17; here logits are used directly.

    Args:
      y_true: as for `binary_crossentropy`.
      y_pred: as for `binary_crossentropy`.
      apply_class_balancing: whether alpha is used.
      alpha: the weight of the positive class; the negative class has weight 1 - alpha.
      gamma: the exponent; 0 gives the binary cross-entropy.
      from_logits: as for `binary_crossentropy`.
      label_smoothing: as for `binary_crossentropy`; the whole formula uses the smoothed label.
      axis: as for `binary_crossentropy`.

    Returns:
      The loss in y_pred's dtype, with its shape without the averaged axes.

    Derivatives:
      As for `jax_bce.focal_loss`, or `jax_bce.loss_from_probs` for probabilities. The factor
      (1 - p_t)^gamma has a gradient even if the p of the logarithms was clipped.

    Raises:
      ValueError, TypeError: as for `binary_crossentropy`.

    Source:
      ``keras.losses.binary_focal_crossentropy`` of Keras 3.

    Example:
      >>> from jax_bce.keras import binary_focal_crossentropy
      >>> (loss,) = binary_focal_crossentropy([[1, 0]], [[0.0, 2.0]], from_logits=True)
      >>> print(f"{loss:.5f}")
      0.91168
    """
    y, x, keywords = _arguments(y_true, y_pred, label_smoothing, axis)
    if from_logits:
        balance = alpha if apply_class_balancing else None
        with renamed(**_NAMES):
            return jax_bce.focal_loss(x, y, alpha=balance, gamma=gamma, **keywords)
    _warn_of_probabilities()
    keywords["epsilon"] = keras.config.epsilon()
    with renamed(**_NAMES):  # before any arithmetic, whose errors would be less clear
        jax.eval_shape(partial(jax_bce.loss_from_probs, **keywords), x, y)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    p, share = x.astype(wide), _number("label_smoothing", label_smoothing, wide)
    smoothed = y.astype(wide) * (1 - share) + share / 2
    wrong, power = smoothed * (1 - p) + (1 - smoothed) * p, _number("gamma", gamma, wide)
    steep = (wrong == 0) & (power < 1)  # the power's derivative would be infinite: use 0
    weight = jnp.where(steep, power == 0, jnp.where(steep, 1, wrong) ** power)
    if apply_class_balancing:
        balance = _number("alpha", alpha, wide)
        weight *= smoothed * balance + (1 - smoothed) * (1 - balance)
    return jax_bce.loss_from_probs(x, y, weight=weight, **keywords)


def _arguments(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    label_smoothing: ArrayLike,
    axis: int | Sequence[int] | None,
) -> tuple[Array, Array, dict[str, Any]]:
    """Labels as they are, predictions in a floating-point dtype, and common keywords."""
    y, x = _tensor("y_true", y_true), _tensor("y_pred", y_pred)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(keras.config.floatx())
    keywords = {"label_smoothing": label_smoothing, "axis": axis, "dtype": x.dtype}
    return y, x, keywords | {"reduction": "mean"}


def _tensor(name: str, value: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """Converts as Keras does, but only accepts dense arrays of numbers."""
    tensor: Array = keras.ops.convert_to_tensor(unwrapped(name, value), dtype)
    return tensor


def _number(name: str, value: ArrayLike, dtype: DTypeLike) -> Array:
    return jnp.asarray(ranged(name, value), dtype)


@cache
def _warn_of_probabilities() -> None:
    """Warns at the line that called this package or Keras, directly or through JAX."""
    libraries = {"jax_bce", "keras", "jax", "contextlib"}
    _, level = caller(lambda module: module.partition(".")[0] in libraries)
    warnings.warn(
        "from_logits=False: the gradient is 0 if a probability is within 1e-7 of 0 or 1, even if "
        "it is wrong, so elements beyond a logit of 17 do not train. Use activation=None in the "
        "last layer and from_logits=True here. If the model already has a sigmoid, set "
        "model.layers[-1].activation = keras.activations.linear and compile it again, with "
        "BinaryAccuracy(threshold=0) instead of 'accuracy', which compares with 0.5. If the "
        "model must not change, jax_bce.logits_of(model) is a function that returns its logits.",
        stacklevel=level,
    )


class _Loss(keras.losses.Loss):  # type: ignore[misc]  # Keras has no annotations
    """Shared by both losses: the mask selects elements, and a mean counts only those."""

    def __call__(
        self, y_true: ArrayLike, y_pred: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Array:
        wide = jnp.promote_types(self.dtype, jnp.float32)
        y, x = _same_rank(
            _tensor("y_true", y_true),
            _tensor("y_pred", y_pred, self.dtype).astype(wide),
        )
        kept = _Mask(reduction="none")([1.0], y_pred) != 0
        losses = self.call(_select(kept, y), _select(kept, x))
        weight = _tensor("sample_weight", 1 if sample_weight is None else sample_weight, wide)
        self._fits(*_same_rank(losses, weight))
        kept, weight = _same_rank(kept, weight)
        losses, weight = _same_rank(losses, jnp.where(kept, weight, 0))
        losses *= weight
        if self.reduction in ("none", None):
            return losses.astype(self.dtype)
        total = jnp.sum(losses)
        if self.reduction == "mean_with_sample_weight":
            total = keras.ops.divide_no_nan(total, jnp.sum(jnp.broadcast_to(weight, losses.shape)))
        elif self.reduction != "sum":
            repeats = losses.size // max(1, kept.size)
            total = keras.ops.divide_no_nan(total, repeats * jnp.sum(kept))
        return total.astype(self.dtype)

    def _fits(self, losses: Array, weight: Array) -> None:
        """Checks that weights broadcast as in Keras, without adding elements to the losses."""
        one_each = not losses.ndim or weight.ndim <= losses.ndim
        try:
            jnp.broadcast_shapes(losses.shape, weight.shape)
        except ValueError:
            one_each = False
        if not one_each:
            hint = "pass one weight for each loss"
            if weight.ndim > losses.ndim:
                name = type(self).__name__
                hint = f"losses are means over axis={self.axis}; to weight each element, use "
                hint += f"{name}(..., axis=()), which averages no axis, or jax_bce.loss(y_pred, "
                hint += "y_true, weight=...)"
            elif weight.shape == losses.shape[: weight.ndim]:
                ones = ", ".join([":"] * weight.ndim + ["None"] * (losses.ndim - weight.ndim))
                hint = f"use sample_weight[{ones}] for weights along the first axes"
            raise ValueError(
                f"sample_weight of shape {weight.shape} does not fit losses of shape "
                f"{losses.shape}: {hint}."
            )


class _Mask(keras.losses.Loss):  # type: ignore[misc]
    """Turns y_true=[1] into the mask of y_pred, or [1]: Keras has no public way to read a mask."""

    def call(self, y_true: Array, y_pred: Array) -> Array:
        return y_true


def _same_rank(one: Array, other: Array) -> tuple[Array, Array]:
    """If ranks differ by a last dimension of 1, adds it to a vector, else removes it."""
    if one.ndim > other.ndim:
        other, one = _same_rank(other, one)
    elif one.ndim + 1 == other.ndim and other.shape[-1] == 1:
        one, other = (one[:, None], other) if one.ndim == 1 else (one, other[..., 0])
    return one, other


def _select(kept: Array, values: Array) -> Array:
    """Replaces dropped values by 0; the mask has the leading dimensions."""
    kept = kept.reshape(kept.shape + (1,) * (values.ndim - kept.ndim))
    return jnp.where(jnp.broadcast_to(kept, values.shape), values, 0)


class BinaryCrossentropy(_Loss, keras.losses.BinaryCrossentropy):  # type: ignore[misc]
    """The mean of `binary_crossentropy`, as a subclass of the Keras class of this name.

    Works in ``compile`` and ``fit``, with sample_weight, class_weight and masks. The loss is saved
    with the model; import ``jax_bce.keras`` before loading it.

    With from_logits=True, metrics receive logits as well, and "accuracy" compares them with 0.5.
    Use ``keras.metrics.BinaryAccuracy(threshold=0)``, ``Precision(thresholds=0)``,
    ``Recall(thresholds=0)`` and ``AUC(from_logits=True)``.

    Deliberate differences from Keras, besides those of `binary_crossentropy`: masked elements may
    be NaN or infinite (Keras: NaN), "mean_with_sample_weight" divides by the sum of the broadcast
    weights (Keras returns the sum for a scalar weight), the mean of an empty batch is 0 (Keras
    returns an empty array), 16-bit losses are summed in float32, and a sample_weight with more
    axes than the losses is an error (Keras broadcasts it if sizes happen to match): to weight
    elements of shape (B, K), pass ``axis=()``.

    Args:
      from_logits: as for `binary_crossentropy`; note the default.
      label_smoothing: as for `binary_crossentropy`.
      axis: as for `binary_crossentropy`.
      reduction: "sum_over_batch_size" or "mean" divides by the number of unmasked losses,
        "mean_with_sample_weight" by the sum of their weights; "sum"; "none" or None.
      name: of the loss.
      dtype: of the converted predictions and of the result; by default, Keras's floatx. For a
        policy, such as "mixed_bfloat16", its compute_dtype. As in Keras, it is not saved.

    Returns:
      When called with y_true, y_pred and sample_weight (optional), the loss in dtype. If y_true
      and y_pred differ by a last dimension of 1, it is added to a vector or removed from any other
      array; likewise for losses and weights.

    Derivatives:
      As for `binary_crossentropy`; exactly 0 for masked elements.

    Raises:
      ValueError: if the reduction is unknown or the shape of sample_weight or a mask does not fit,
        or as for `binary_crossentropy`.
      TypeError: as for `binary_crossentropy`.

    Source:
      ``keras.losses.BinaryCrossentropy`` of Keras 3.

    Example:
      >>> from jax_bce.keras import BinaryCrossentropy
      >>> loss = BinaryCrossentropy(from_logits=True)
      >>> print(loss([0, 1, 0, 0], [-18.6, 0.51, 2.94, -12.8]))
      0.86545795
      >>> loss.get_config()["from_logits"]
      True
    """

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """The mean of each sample, for arrays of one shape."""
        return binary_crossentropy(
            y_true, y_pred, self.from_logits, self.label_smoothing, self.axis
        )


class BinaryFocalCrossentropy(_Loss, keras.losses.BinaryFocalCrossentropy):  # type: ignore[misc]
    """The mean of `binary_focal_crossentropy`, as a subclass of the Keras class of this name.

    Deliberate differences from Keras: as for `binary_focal_crossentropy` and `BinaryCrossentropy`.

    Args:
      apply_class_balancing: as for `binary_focal_crossentropy`.
      alpha: as for `binary_focal_crossentropy`.
      gamma: as for `binary_focal_crossentropy`.
      from_logits: as for `binary_crossentropy`; note the default.
      label_smoothing: as for `binary_focal_crossentropy`.
      axis: as for `binary_crossentropy`.
      reduction: as for `BinaryCrossentropy`.
      name: of the loss.
      dtype: as for `BinaryCrossentropy`.

    Returns:
      As for `BinaryCrossentropy`.

    Derivatives:
      As for `binary_focal_crossentropy`; exactly 0 for masked elements.

    Raises:
      ValueError, TypeError: as for `BinaryCrossentropy`.

    Source:
      ``keras.losses.BinaryFocalCrossentropy`` of Keras 3.

    Example:
      >>> from jax_bce.keras import BinaryFocalCrossentropy
      >>> loss = BinaryFocalCrossentropy(gamma=3.0, from_logits=True)
      >>> print(f"{loss([[0, 1], [0, 0]], [[-18.6, 0.51], [2.94, -12.8]]):.5f}")
      0.64700
    """

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """The mean of each sample, for arrays of one shape."""
        return binary_focal_crossentropy(
            y_true,
            y_pred,
            self.apply_class_balancing,
            self.alpha,
            self.gamma,
            self.from_logits,
            self.label_smoothing,
            self.axis,
        )


for _name in __all__:
    keras.saving.register_keras_serializable("jax_bce")(globals()[_name])
