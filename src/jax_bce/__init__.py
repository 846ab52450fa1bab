"""Binary cross-entropy for JAX: sigmoid, loss and gradient in one fused kernel."""

import importlib as _importlib
import typing as _typing
from importlib.metadata import version as _version

from jax_bce._check import checking
from jax_bce._linear import linear_loss
from jax_bce._logits_of import logits_of
from jax_bce._loss import loss, loss_and_grad
from jax_bce._relatives import asymmetric_loss, focal_loss, grad_and_hess, loss_from_probs
from jax_bce._siglip import siglip_loss

__all__ = [
    "asymmetric_loss",
    "checking",
    "focal_loss",
    "grad_and_hess",
    "linear_loss",
    "logits_of",
    "loss",
    "loss_and_grad",
    "loss_from_probs",
    "siglip_loss",
]
__version__ = _version("jax-bce")
_DROP_INS = ("keras", "optax", "torch_like")

# Drop-ins are imported on first use; jax_bce.keras imports Keras. Type checkers see plain imports:
# with __getattr__, they would accept any name.
if _typing.TYPE_CHECKING:
    from jax_bce import keras as keras
    from jax_bce import optax as optax
    from jax_bce import torch_like as torch_like
else:

    def __getattr__(name: str) -> object:
        if name in _DROP_INS:
            return _importlib.import_module(f"jax_bce.{name}")
        raise AttributeError(f"module 'jax_bce' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DROP_INS})
