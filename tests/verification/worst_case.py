"""Looks for the inputs whose results are farthest from the exact ones.

A hill climb: of many inputs those with the largest errors stay, and copies of them that are changed
by a few bits take the places of the others. Exact values are in double precision for float32
results, and in mpmath's numbers for float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import oracle

import jax_bce

# Of float32: 0.1 is rounded, and 1 minus each is exact in float64.
SMOOTHINGS = tuple(map(float, np.float32([0.1, 0.5, 1e-6, 0.9])))
# Which factors an element has, and how its label is smoothed.
KINDS: dict[str, tuple[tuple[str, ...], Sequence[float]]] = {
    "soft labels": ((), (0.0,)),
    "smoothed labels": ((), SMOOTHINGS),
    "pos_weight": (("pos_weight",), (0.0,)),
    "weight": (("weight",), (0.0,)),
    "three weights": (("weight", "sample_weight", "pos_weight"), (0.0,)),
    "three weights, smoothed": (("weight", "sample_weight", "pos_weight"), SMOOTHINGS),
}
STAY = 64
# Whose logarithms are drawn: logits and weights, of either sign or none, and labels.
MAGNITUDES = {"logits": (2.0**-20, 800.0), "labels": (2.0**-30, 1.0)}
OF_WEIGHTS = (2.0**-10, 2.0**10)


@dataclass(frozen=True)
class Found:
    """The largest error of a result, and the inputs it belongs to."""

    ulp: float
    allowed: float
    at: Mapping[str, float]


def drawn(name: str, size: int, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    low, high = MAGNITUDES.get(name, OF_WEIGHTS)
    value = np.exp(rng.uniform(np.log(low), np.log(high), size))
    if name == "logits":
        value *= rng.choice([-1, 1], size)
    if name == "labels":  # those close to 1, too, and 0 and 1
        value = np.select([rng.random(size) < 0.4, rng.random(size) < 0.1], [1 - value, 1], value)
    return value.astype(dtype)


def changed(name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of them by a number of units in their last places, from 1 to all."""
    signed = np.dtype(f"i{values.itemsize}")
    digits = np.finfo(values.dtype).nmant + 2
    steps = np.exp2(rng.uniform(0, digits, values.size)).astype(signed)
    steps *= rng.choice(np.array([-1, 0, 0, 1], signed), values.size)
    moved = (values.view(signed) + steps).view(values.dtype)
    low, high = MAGNITUDES.get(name, OF_WEIGHTS)
    least = 0 if name == "labels" else low
    return np.where((abs(moved) >= least) & (abs(moved) <= high), moved, values)


def errors(
    inputs: Mapping[str, np.ndarray], smoothing: float, call: object
) -> tuple[np.ndarray, np.ndarray]:
    """Of losses and gradients, in ulp.

    Beyond one unit of the smallest subnormal number, times the weights: an element is rounded to
    such a unit before it is weighted.
    """
    logits, labels = inputs["logits"], inputs["labels"]
    factors = {name: values for name, values in inputs.items() if name not in MAGNITUDES}
    exact = oracle.exact(logits, labels, smoothing, factors.get("pos_weight", 1.0))
    weight: np.ndarray | float = 1.0
    for name in factors.keys() - {"pos_weight"}:
        weight = weight * factors[name].astype(exact.loss.dtype)
    loss, gradient = map(np.asarray, call(logits, labels, smoothing, factors))
    product = np.prod([values.astype(np.float64) for values in factors.values()], axis=0)
    smallest = float(np.finfo(logits.dtype).smallest_subnormal) if factors else 0.0
    found = []
    for actual, expected, scale in (
        (loss, exact.loss, exact.loss),
        (gradient, exact.gradient, exact.gradient_scale),
    ):
        expected, scale = expected * weight, scale * weight
        distance = oracle.ulp_distance(actual, expected, logits.dtype, scale)
        rounded = smallest * product / oracle.ulp(scale, logits.dtype)
        found.append(np.maximum(distance - rounded, 0))
    return found[0], found[1]


def search(dtype: np.dtype, kind: str, size: int, steps: int, seed: int = 1) -> dict[str, Found]:
    """The worst loss and the worst gradient among `size` inputs that are changed so many times."""
    rng = np.random.default_rng(seed)
    factors, smoothings = KINDS[kind]
    names = ("logits", "labels", *factors)
    own = oracle.TOLERANCE["cpu"].elements[dtype.name, "soft"]
    more = oracle.TOLERANCE["cpu"].factor * len(factors)
    call = jax.jit(
        lambda x, y, s, factors: jax_bce.loss_and_grad(
            x, y, label_smoothing=s, **factors, reduction="none", implementation="cpu"
        )
    )
    found = {
        "loss": Found(0.0, own.loss + more, {}),
        "gradient": Found(0.0, own.gradient + more, {}),
    }
    for smoothing in smoothings:
        for which, result in enumerate(found):
            best = {name: drawn(name, STAY, dtype, rng) for name in names}
            for _ in range(steps):
                fresh = {name: drawn(name, size // 4, dtype, rng) for name in names}
                parents = np.concatenate([np.arange(STAY), rng.integers(0, STAY, size - STAY)])
                inputs = {}
                for name in names:
                    children = best[name][parents]
                    children[STAY:] = changed(name, children[STAY:], rng)
                    children[size - size // 4 :] = fresh[name]
                    inputs[name] = children
                error = errors(inputs, smoothing, call)[which]
                order = np.argsort(-error, kind="stable")[:STAY]
                best = {name: values[order] for name, values in inputs.items()}
                if error[order[0]] > found[result].ulp:
                    at = {name: float(values[0]) for name, values in best.items()}
                    at |= {"label_smoothing": smoothing} if smoothing else {}
                    found[result] = Found(float(error[order[0]]), found[result].allowed, at)
    return found
