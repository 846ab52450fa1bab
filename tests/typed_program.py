"""What a type checker makes of a user's program: `make lint` gives it to mypy --strict.

A line with an ignore is a mistake that mypy must find: an ignore that is not needed is an error.
"""

import jax
import jax.numpy as jnp

import jax_bce

logits, labels = jnp.zeros((4, 3)), jnp.ones((4, 3))

loss: jax.Array = jax_bce.loss(logits, labels, where=labels > 0, reduction="weighted_mean")
both: tuple[jax.Array, jax.Array] = jax_bce.loss_and_grad(logits, labels, implementation="xla")
focal: jax.Array = jax_bce.focal_loss(logits, labels, gamma=1.5, axis=(0, 1), dtype=jnp.float32)
dropped_in: jax.Array = jax_bce.optax.sigmoid_binary_cross_entropy(logits, labels)
positives = jnp.zeros((4, 2), jnp.int32)
layer: jax.Array = jax_bce.linear_loss(logits.T, logits, positives=positives[:3], axis=1)
pairs: jax.Array = jax_bce.siglip_loss(logits, labels, 10.0, -10.0, axis_name="data")
module: jax.Array = jax_bce.torch_like.BCEWithLogitsLoss(reduction="sum")(logits, labels)

jax_bce.lozz(logits, labels)  # type: ignore[attr-defined]
jax_bce.loss(logits)  # type: ignore[call-arg]
jax_bce.loss(logits, labels, reduction="batchmean")  # type: ignore[arg-type]
jax_bce.loss(logits, labels, residuals="none")  # type: ignore[arg-type]
jax_bce.loss(logits, labels, implementation="gpu")  # type: ignore[arg-type]
jax_bce.loss(logits, labels, posweight=2.0)  # type: ignore[call-arg]
jax_bce.loss("logits", labels)  # type: ignore[arg-type]
jax_bce.focal_loss(logits, labels, pos_weight=2.0)  # type: ignore[call-arg]
jax_bce.loss_and_grad(logits, labels, reduction="batchmean")  # type: ignore[arg-type]
jax_bce.linear_loss(logits)  # type: ignore[call-arg]
jax_bce.linear_loss(logits.T, logits, labels, reduction="batchmean")  # type: ignore[arg-type]
jax_bce.siglip_loss(logits, labels)  # type: ignore[call-arg]
jax_bce.optax.sigmoid_bce(logits, labels)  # type: ignore[attr-defined]
jax_bce.torch_like.BCEWithLogitsLoss(reduction="batchmean")  # type: ignore[arg-type]
