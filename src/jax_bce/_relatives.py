"""Losses related to the cross-entropy.

Focal and asymmetric losses are calls of the same primitive as `loss`, with a gamma; first and
second derivatives are a kind of their own. The loss of probabilities is a formula of
`_reference.py`, compiled by XLA. Weights, masks, reductions, denominators and types use the code of
`loss`.
"""

from __future__ import annotations  # help() shows names, not the Union behind them

from typing import Unpack, get_args

from jax import Array
from jax.typing import ArrayLike

from jax_bce import _reference
from jax_bce._arguments import (
    Implementation,
    Keywords,
    Residuals,
    checked,
    one_of,
    only_known,
    shows_keywords,
)
from jax_bce._evaluate import Call, evaluate
from jax_bce._loss import loss, loss_of
from jax_bce._operands import known, ranged
from jax_bce._primitive import bce


def _is_zero(name: str, value: ArrayLike) -> bool:
    """Whether this is the number 0; False for a traced number, whose value is unknown."""
    number = known(ranged(name, value))
    return number is not None and number.ndim == 0 and bool(number == 0)


def _only_xla(name: str, keywords: Keywords) -> None:
    implementation = keywords.get("implementation")
    one_of("implementation", implementation, (None, *get_args(Implementation)))
    if implementation not in (None, "xla"):
        raise RuntimeError(
            f"implementation={implementation!r} is not available for {name}, which has no kernel "
            "of its own: use implementation=None."
        )


@shows_keywords
def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    residuals: Residuals = "gradient",
    **keywords: Unpack[Keywords],
) -> Array:
    r"""Focal loss: cross-entropy that gives well-classified elements less weight.

    .. math:: l = \alpha_t (1 - p_t)^\gamma \left(-y \log p - (1 - y) \log(1 - p)\right),

    with :math:`p = \sigma(x)`, :math:`p_t = y p + (1 - y) (1 - p)` and :math:`\alpha_t = \alpha y +
    (1 - \alpha) (1 - y)`, in nats. The power is computed from a logarithm that is formed
    from the logit, so nothing vanishes or overflows in either tail.

    Args:
      logits: as for `loss`.
      labels: as for `loss`; p_t is linear in soft labels, after smoothing.
      alpha: the weight of the positive class; the negative class has weight 1 - alpha. A number, or
        one per class (trailing-aligned). If None, neither class is weighted.
      gamma: the exponent, at least 0: a number, or one per class. If it is the number 0 and alpha
        is None, the result is that of `loss`, bit for bit.
      residuals: as for `loss`.
      **keywords: the keywords of `loss` except pos_weight. On a CPU, and on a GPU with
        ``implementation="cuda"``, a kernel computes loss and gradient in one pass; otherwise, XLA
        compiles this loss.

    Returns:
      The loss, with the shape and dtype that `loss` returns. The denominator of "weighted_mean"
      includes weight and sample_weight, not the factors above.

    Derivatives:
      With respect to logits, float labels, alpha, gamma, weights, label_smoothing and normalizer,
      to any order, in their argument's dtype. Those with respect to finite logits are finite.

    Raises:
      TypeError, ValueError, RuntimeError: as for `loss`; ValueError if alpha or gamma is out of
        range or cannot be broadcast to the logits.

    Source:
      Lin et al., Focal Loss for Dense Object Detection, 2017, https://arxiv.org/abs/1708.02002.
      The derivation is in ``csrc/bce_focal.h``.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> print(jax_bce.focal_loss(jnp.array([1.0, 1.0]), jnp.array([1, 0]), reduction="none"))
      [0.02265806 0.7018683 ]
    """
    only_known("focal_loss", keywords)
    if alpha is None and _is_zero("gamma", gamma):
        return loss(logits, labels, residuals=residuals, **keywords)
    one_of("residuals", residuals, get_args(Residuals))
    numbers = {"gamma": gamma} if alpha is None else {"alpha": alpha, "gamma": gamma}
    return evaluate(loss_of, checked(logits, labels, numbers=numbers, **keywords), residuals)


@shows_keywords
def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: ArrayLike = 4.0,
    gamma_pos: ArrayLike = 1.0,
    clip: ArrayLike = 0.05,
    stop_gradient_weight: bool = False,
    residuals: Residuals = "gradient",
    **keywords: Unpack[Keywords],
) -> Array:
    r"""Asymmetric loss: focal loss with an exponent for each class, without easy negatives.

    .. math:: l = (1 - p_t)^\gamma \left(-y \log p - (1 - y) \log(1 - p_m)\right),

    with :math:`p = \sigma(x)`, :math:`p_m = \max(p - \text{clip}, 0)`, :math:`1 - p_t = y (1 - p) +
    (1 - y) p_m` and :math:`\gamma = y \gamma_+ + (1 - y) \gamma_-`, in nats. Positives are
    not clamped: the usual floor of 1e-8 is not needed.

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      gamma_neg: the exponent for the negative class, at least 0: a number, or one per class
        (trailing-aligned).
      gamma_pos: the exponent for the positive class, like gamma_neg.
      clip: the probability, in [0, 1), below which a negative has no loss: a number, or one per
        class. If all three are the number 0, the result is that of `loss`, bit for bit.
      stop_gradient_weight: If True, the power is a constant under differentiation.
      residuals: as for `loss`.
      **keywords: the keywords of `loss` except pos_weight. On a CPU, and on a GPU with
        ``implementation="cuda"``, a kernel computes loss and gradient in one pass; otherwise, XLA
        compiles this loss.

    Returns:
      The loss, with the shape and dtype that `loss` returns.

    Derivatives:
      With respect to everything that may be traced, to any order, in their argument's dtype. Those
      with respect to finite logits are finite.

    Raises:
      TypeError, ValueError, RuntimeError: as for `loss`; ValueError if an exponent or clip is out
        of range or cannot be broadcast to the logits.

    Source:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2020,
      https://arxiv.org/abs/2009.14119. The derivation is in ``csrc/bce_focal.h``.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> logits, labels = jnp.array([1.0, 1.0, -5.0]), jnp.array([0, 1, 0])
      >>> print(jax_bce.asymmetric_loss(logits, labels, reduction="none"))
      [0.24586022 0.08424904 0.        ]
    """
    only_known("asymmetric_loss", keywords)
    if not isinstance(stop_gradient_weight, bool):
        raise TypeError(
            "stop_gradient_weight must be True or False (it is static under jit), got "
            f"{type(stop_gradient_weight).__name__}."
        )
    one_of("residuals", residuals, get_args(Residuals))
    numbers = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    if all(_is_zero(name, value) for name, value in numbers.items()):
        return loss(logits, labels, residuals=residuals, **keywords)
    if _is_zero("clip", clip):
        del numbers["clip"]
    arguments = checked(logits, labels, numbers=numbers, **keywords)
    arguments.arrays["gamma"] = arguments.arrays.pop("gamma_neg")
    return evaluate(loss_of, arguments, residuals, stop_gradient_weight)


@shows_keywords
def loss_from_probs(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike | None = None,
    log_epsilon: ArrayLike = 0.0,
    pos_weight: ArrayLike | None = None,
    **keywords: Unpack[Keywords],
) -> Array:
    r"""Binary cross-entropy of probabilities, for models that do not return logits.

    .. math:: l = -q y \log(p + \delta) - (1 - y) \log(1 - p + \delta)

    A rounded sigmoid has already lost the logit's tails: prefer `loss`, or `logits_of` the model.

    Args:
      probs: probabilities p in [0, 1], in a floating-point dtype; may be subnormal. For other
        values, the loss and its derivatives are NaN for every label, unless p is clipped.
      labels: as for `loss`.
      epsilon: If None, the logarithms are exact and may be infinite. If a number, p is first
        clipped to [epsilon, 1 - epsilon] in float32 or wider; the gradient of a clipped p is 0.
        Keras 3 uses 1e-7. It may be subnormal.
      log_epsilon: added inside both logarithms, whose arguments are not rounded. tf.keras 2 uses
        1e-7 for both epsilons.
      pos_weight: as for `loss`.
      **keywords: the keywords of `loss` except residuals. XLA compiles this loss: implementation
        must be None or "xla".

    Returns:
      The loss, with the shape and dtype that `loss` returns.

    Derivatives:
      With respect to everything that may be traced, to any order, in their argument's dtype.
      Derivatives of a logarithm, such as 1 / p, are at most 3.39e38 (the largest bfloat16 number,
      or float64 number for float64 probabilities), even at p = 0. In float16 they overflow beyond
      65,504. On a CPU, XLA flushes subnormal losses and derivatives to 0, and treats subnormal
      labels and weights as 0.

    Raises:
      TypeError, ValueError, RuntimeError: as for `loss`.

    Source:
      The definition.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> probs, labels = jnp.array([1.0, 1.0, 0.0]), jnp.array([1, 1, 1])
      >>> for options in {}, {"epsilon": 1e-7}, {"epsilon": 1e-7, "log_epsilon": 1e-7}:
      ...     print(jax_bce.loss_from_probs(probs, labels, **options))
      inf
      5.372699
      5.1416497
    """
    only_known("loss_from_probs", keywords)
    _only_xla("loss_from_probs", keywords)
    numbers = {"log_epsilon": log_epsilon}
    if epsilon is not None:
        numbers = {"epsilon": epsilon, **numbers}
    arguments = checked(
        probs, labels, pos_weight=pos_weight, name="probs", numbers=numbers, **keywords
    )
    return evaluate(_loss_from_probs, arguments)


def _loss_from_probs(call: Call) -> Array:
    element = call.elements(absent=0.5)
    epsilon = call.number("epsilon") if "epsilon" in call.numbers else None
    values = _reference.loss_of_probabilities(element, epsilon, call.number("log_epsilon"))
    return call.total(element.weighted(values))


def grad_and_hess(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    hess_floor: ArrayLike = 0.0,
) -> tuple[Array, Array]:
    r"""First and second derivatives of each element's loss, for boosting, Newton and Laplace.

    .. math:: g = w \left((1 - y) \sigma(x) - q y \sigma(-x)\right), \quad
              h = w \max\left((q y + 1 - y) \sigma(x) \sigma(-x), \text{floor}\right)

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      weight: as for `loss`.
      sample_weight: as for `loss`.
      pos_weight: as for `loss`.
      hess_floor: lower bound of h before weights, at least 0: a number, or one per class
        (trailing-aligned). XGBoost uses 1e-16.

    Returns:
      The gradient and the diagonal of the Hessian of ``loss(..., reduction="sum")``, each with the
      logits' shape and dtype. On a CPU, a kernel computes both in one pass; elsewhere, XLA compiles
      the formulas. The Hessian decays as ``exp(-|x|)``. The kernel returns it down to the smallest
      subnormal number, at ``|x|`` of 103 in float32; XLA may flush it to 0 above 87.

    Derivatives:
      As for `loss`.

    Raises:
      TypeError, ValueError: as for `loss`.

    Source:
      The derivation is in ``csrc/bce_math.h``.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> gradient, hessian = jax_bce.grad_and_hess(jnp.array([0.0, 1.0]), jnp.array([0, 1]))
      >>> print(gradient, hessian)
      [ 0.5        -0.26894143] [0.25       0.19661193]
    """
    arguments = checked(
        logits,
        labels,
        weight=weight,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        reduction="none",
        numbers={"hess_floor": hess_floor},
    )
    return evaluate(_grad_and_hess, arguments)


def _grad_and_hess(call: Call) -> tuple[Array, Array]:
    hessian, gradient = bce(*call.operands, kind="hess_and_grad", **call.params)
    return gradient, hessian
