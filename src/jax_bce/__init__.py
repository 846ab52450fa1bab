"""Binary cross-entropy for JAX: sigmoid, loss and gradient in one exact, fused kernel."""

import importlib as _importlib
from importlib.metadata import version as _version
from typing import Any as _Any

from jax_bce._check import checking
from jax_bce._logits_of import logits_of
from jax_bce._loss import loss, loss_and_grad
from jax_bce._relatives import asymmetric_loss, focal_loss, grad_and_hess, loss_from_probs

__all__ = [
    "asymmetric_loss",
    "checking",
    "focal_loss",
    "grad_and_hess",
    "logits_of",
    "loss",
    "loss_and_grad",
    "loss_from_probs",
]
__version__ = _version("jax-bce")


def __getattr__(name: str) -> _Any:
    """The drop-ins are imported when they are first used, and Keras with its own."""
    if name in ("keras", "optax", "torch_like"):
        return _importlib.import_module(f"jax_bce.{name}")
    raise AttributeError(f"module 'jax_bce' has no attribute {name!r}")
