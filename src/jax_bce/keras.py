"""The binary cross-entropies of Keras 3 on JAX, under Keras's names and with its defaults.

Importing this module imports Keras. Losses that were saved with a model are found once it is
imported. Elements are the package's; weights, masks and reductions are written here, because Keras
multiplies by a mask, and what is NaN stays NaN.
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
    import keras  # type: ignore  # it has no annotations, and may be missing
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
    r"""Binary cross-entropy, the mean over an axis, called as Keras's function of this name.

    For a label :math:`y` and a probability :math:`p`, clipped to [1e-7, 1 - 1e-7] (or to what
    ``keras.config.epsilon()`` says), or the sigmoid of a logit, not clipped, each element is

    .. math:: l = -y \log p - (1 - y) \log(1 - p)

    Differs from Keras on purpose: an infinite logit has its limit (Keras: NaN), labels are read as
    they are stored (Keras rounds them to y_pred's dtype first), 16-bit elements are evaluated in
    float32 and averaged there (Keras: NaN at a probability of 1), and a label_smoothing outside
    [0, 1] is an error.

    Args:
      y_true: labels of y_pred's shape; any dtype that `jax_bce.loss` takes.
      y_pred: probabilities, or logits: float16, bfloat16, float32 or float64. Others are converted
        to Keras's floatx.
      from_logits: whether y_pred holds logits. From probabilities the gradient is 0 wherever they
        were clipped, be the answer right or wrong: that warns once per process.
      label_smoothing: s in [0, 1]; a label y becomes y (1 - s) + s / 2.
      axis: the axes to average; None averages all.

    Returns:
      The loss in y_pred's dtype, of its shape without the averaged axes.

    Derivatives:
      As `jax_bce.loss` or `jax_bce.loss_from_probs` has them.

    Raises:
      ValueError: y_true of another shape, unless it is a scalar; an axis out of range.
      TypeError: a dtype that `jax_bce.loss` does not take.

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
    r"""Focal loss, the mean over an axis, called as Keras's function of this name.

    .. math:: l = -\alpha_t (1 - p_t)^\gamma (y \log p + (1 - y) \log(1 - p))

    with :math:`p_t = y p + (1 - y)(1 - p)`, and :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`
    if the classes are balanced, else 1.

    Differs from Keras on purpose as `binary_crossentropy` does. Logits stay logits: Keras turns
    them into probabilities, and its gradient is 0 beyond 17.

    Args:
      y_true: as for `binary_crossentropy`.
      y_pred: as for `binary_crossentropy`.
      apply_class_balancing: whether alpha is used.
      alpha: the weight of the positive class; that of the negative class is 1 - alpha.
      gamma: the exponent; 0 leaves the binary cross-entropy.
      from_logits: as for `binary_crossentropy`.
      label_smoothing: as for `binary_crossentropy`; all of the formula sees the smoothed label.
      axis: as for `binary_crossentropy`.

    Returns:
      The loss in y_pred's dtype, of its shape without the averaged axes.

    Derivatives:
      As `jax_bce.focal_loss` has them, or from probabilities, `jax_bce.loss_from_probs`; there the
      factor (1 - p_t)^gamma has its gradient also where the logarithms' p was clipped.

    Raises:
      ValueError, TypeError: as `binary_crossentropy` does.

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
    with renamed(**_NAMES):  # before any arithmetic, which would fail in words of its own
        jax.eval_shape(partial(jax_bce.loss_from_probs, **keywords), x, y)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    p, share = x.astype(wide), _number("label_smoothing", label_smoothing, wide)
    smoothed = y.astype(wide) * (1 - share) + share / 2
    wrong, power = smoothed * (1 - p) + (1 - smoothed) * p, _number("gamma", gamma, wide)
    steep = (wrong == 0) & (power < 1)  # where the derivative of the power is infinite: 0 here
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
    """Labels as they are, predictions as numbers that have a derivative, and common keywords."""
    y, x = _tensor("y_true", y_true), _tensor("y_pred", y_pred)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(keras.config.floatx())
    keywords = {"label_smoothing": label_smoothing, "axis": axis, "dtype": x.dtype}
    return y, x, keywords | {"reduction": "mean"}


def _tensor(name: str, value: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """As Keras converts it, but nothing that is no dense array of numbers."""
    tensor: Array = keras.ops.convert_to_tensor(unwrapped(name, value), dtype)
    return tensor


def _number(name: str, value: ArrayLike, dtype: DTypeLike) -> Array:
    return jnp.asarray(ranged(name, value), dtype)


@cache
def _warn_of_probabilities() -> None:
    """Points at the line that called this package, Keras or, through it, JAX."""
    libraries = {"jax_bce", "keras", "jax", "contextlib"}
    _, level = caller(lambda module: module.partition(".")[0] in libraries)
    warnings.warn(
        "from_logits=False: the gradient is 0 where a probability is within 1e-7 of 0 or 1, also "
        "where it is wrong, and nothing beyond a logit of 17 trains. Use activation=None in the "
        "last layer and from_logits=True here. Of a model that has its sigmoid, set "
        "model.layers[-1].activation = keras.activations.linear and compile it again, with "
        "BinaryAccuracy(threshold=0) instead of 'accuracy', which compares with 0.5; where the "
        "model must stay as it is, jax_bce.logits_of(model) is a function that returns its logits.",
        stacklevel=level,
    )


class _Loss(keras.losses.Loss):  # type: ignore[misc]  # Keras has no annotations
    """What both losses have in common: a mask selects, and a mean divides by what it sums."""

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
        """As Keras broadcasts weights, but not to more than there are losses."""
        one_each = not losses.ndim or weight.ndim <= losses.ndim
        try:
            jnp.broadcast_shapes(losses.shape, weight.shape)
        except ValueError:
            one_each = False
        if not one_each:
            hint = "pass one weight for each loss"
            if weight.ndim > losses.ndim:
                name = type(self).__name__
                hint = f"losses are means over axis={self.axis}; for a weight for each element, "
                hint += f"{name}(..., axis=()) averages none, and jax_bce.loss(y_pred, y_true, "
                hint += "weight=...) takes such weights, too"
            elif weight.shape == losses.shape[: weight.ndim]:
                ones = ", ".join([":"] * weight.ndim + ["None"] * (losses.ndim - weight.ndim))
                hint = f"sample_weight[{ones}] has one for each of the first axes"
            raise ValueError(
                f"sample_weight of shape {weight.shape} does not fit losses of shape "
                f"{losses.shape}: {hint}."
            )


class _Mask(keras.losses.Loss):  # type: ignore[misc]
    """Of y_true=[1] it makes the mask that y_pred carries, or [1]; nothing public reads a mask."""

    def call(self, y_true: Array, y_pred: Array) -> Array:
        return y_true


def _same_rank(one: Array, other: Array) -> tuple[Array, Array]:
    """Where ranks differ by a last dimension of 1, a vector gets one and anything else loses it."""
    if one.ndim > other.ndim:
        other, one = _same_rank(other, one)
    elif one.ndim + 1 == other.ndim and other.shape[-1] == 1:
        one, other = (one[:, None], other) if one.ndim == 1 else (one, other[..., 0])
    return one, other


def _select(kept: Array, values: Array) -> Array:
    """0 in place of dropped values; the mask has the leading dimensions."""
    kept = kept.reshape(kept.shape + (1,) * (values.ndim - kept.ndim))
    return jnp.where(jnp.broadcast_to(kept, values.shape), values, 0)


class BinaryCrossentropy(_Loss, keras.losses.BinaryCrossentropy):  # type: ignore[misc]
    """The mean of `binary_crossentropy`, called as Keras's class of this name, which it is.

    For ``compile`` and ``fit``, with sample_weight, class_weight and masks; it is saved with the
    model, and loaded once ``jax_bce.keras`` is imported.

    With from_logits=True, metrics get logits, too, and "accuracy" compares them with 0.5: use
    ``keras.metrics.BinaryAccuracy(threshold=0)``, ``Precision(thresholds=0)``,
    ``Recall(thresholds=0)`` and ``AUC(from_logits=True)``.

    Differs from Keras on purpose, beside what `binary_crossentropy` says: what a mask drops may be
    NaN or infinite (Keras: NaN), "mean_with_sample_weight" divides by the sum of the weights as
    they are broadcast (Keras returns the sum for a scalar weight), the mean of an empty batch is 0
    (Keras returns an empty array), 16-bit losses are summed in float32, and a sample_weight with
    more axes than the losses is an error (Keras broadcasts it where sizes happen to agree): to
    weigh elements, of shape (B, K), pass ``axis=()``.

    Args:
      from_logits: as for `binary_crossentropy`; mind the default.
      label_smoothing: as for `binary_crossentropy`.
      axis: as for `binary_crossentropy`.
      reduction: "sum_over_batch_size" or "mean", over the number of losses that no mask drops;
        "mean_with_sample_weight", over the sum of their weights; "sum"; "none" or None.
      name: of the loss.
      dtype: what predictions are converted to, and the result's; None is Keras's floatx. A policy,
        such as "mixed_bfloat16", counts as its compute_dtype. As in Keras, it is not saved.

    Returns:
      Called with y_true, y_pred and sample_weight (None), the loss in dtype. Where y_true and
      y_pred differ by a last dimension of 1, a vector gets one and anything else loses it; likewise
      losses and weights.

    Derivatives:
      As `binary_crossentropy` has them; exactly 0 in what a mask drops.

    Raises:
      ValueError: an unknown reduction, a sample_weight or a mask of another shape, or as
        `binary_crossentropy` does.
      TypeError: as `binary_crossentropy` does.

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
    """The mean of `binary_focal_crossentropy`, called as Keras's class of this name, which it is.

    Differs from Keras on purpose as `binary_focal_crossentropy` and `BinaryCrossentropy` do.

    Args:
      apply_class_balancing: as for `binary_focal_crossentropy`.
      alpha: as for `binary_focal_crossentropy`.
      gamma: as for `binary_focal_crossentropy`.
      from_logits: as for `binary_crossentropy`; mind the default.
      label_smoothing: as for `binary_focal_crossentropy`.
      axis: as for `binary_crossentropy`.
      reduction: as for `BinaryCrossentropy`.
      name: of the loss.
      dtype: as for `BinaryCrossentropy`.

    Returns:
      As `BinaryCrossentropy` does.

    Derivatives:
      As `binary_focal_crossentropy` has them; exactly 0 in what a mask drops.

    Raises:
      ValueError, TypeError: as `BinaryCrossentropy` does.

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
