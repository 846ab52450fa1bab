"""Checks that an installed wheel is complete. `make wheels` and the wheels' workflow run this for
each wheel, in an environment that holds only its dependencies.

JAX_BCE_CUDA and CUDAARCHS say whether there should be a CUDA kernel, as they do for the build.
"""

import math
import os

import jax
import jax.numpy as jnp

import jax_bce
from jax_bce.__main__ import report

jax.config.update("jax_platforms", "cpu")
facts = report()
print("\n".join(f"{fact:20} {value}" for fact, value in facts.items()))

# Each of these is its exact value, rounded once.
step = jax.jit(jax.value_and_grad(jax_bce.loss))
loss, gradient = step(jnp.array([0.0, 0.0]), jnp.array([1, 0], jnp.uint8))
assert loss == jnp.float32(math.log(2)), loss
assert gradient.tolist() == [-0.25, 0.25], gradient
tail = jax.jit(jax_bce.loss)(-20.0, 0.0)
assert tail == jnp.float32(math.log1p(math.exp(-20))), tail

assert facts["cpu kernel"].startswith("loaded, "), facts["cpu kernel"]
compiled = step.lower(jnp.zeros(2), jnp.zeros(2)).compile().as_text()
assert 'custom_call_target="jax_bce_v3' in compiled, compiled

mode = os.environ.get("JAX_BCE_CUDA", "AUTO")
has_cuda = "built with CUDA" in facts["cuda kernel"]
if mode == "OFF":
    assert not has_cuda, "JAX_BCE_CUDA=OFF, but there is a CUDA kernel"
elif mode in ("ON", "PYPI") or "CUDAARCHS" in os.environ:
    assert has_cuda, f"JAX_BCE_CUDA={mode}, but the CUDA kernel is {facts['cuda kernel']}"
