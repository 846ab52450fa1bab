"""Binary cross-entropy for JAX: sigmoid, loss and gradient in one exact, fused kernel."""

from importlib.metadata import version as _version

from jax_bce._loss import loss, loss_and_grad

__all__ = ["loss", "loss_and_grad"]
__version__ = _version("jax-bce")
