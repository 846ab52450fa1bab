"""Finds the caller of the package, and renames arguments in errors as the caller names them."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Keras calls losses and metrics from these modules, with the labels first.
_LABELS_FIRST = ("keras.src.losses.", "keras.src.metrics.")


def caller(skipped: Callable[[str], bool]) -> tuple[str, int]:
    """The module of the first frame that is not skipped, and its stacklevel for the caller."""
    frame, level = sys._getframe(1), 1
    while skipped(frame.f_globals.get("__name__", "")) and frame.f_back:
        frame, level = frame.f_back, level + 1
    return frame.f_globals.get("__name__", ""), level


def _takes_logits_first(module: str) -> bool:
    """Whether the module is the package, except `jax_bce.keras`, or wraps its functions."""
    package = module.partition(".")[0]
    return package in ("jax_bce", "jax", "contextlib") and module != "jax_bce.keras"


def refuse_keras() -> None:
    """Raises if Keras is the caller: it would silently train on swapped arguments."""
    module, _ = caller(_takes_logits_first)
    if module.startswith(_LABELS_FIRST):
        raise TypeError(
            "Keras passes y_true first, but this function takes it second: compile the model with "
            "jax_bce.keras.BinaryCrossentropy(from_logits=True) or BinaryFocalCrossentropy, or "
            "with a function such as lambda y_true, y_pred: jax_bce.loss(y_pred, y_true, axis=-1)."
        )


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors raised inside use the caller's names of the arguments.

    They do not suggest sample_weight, which no drop-in function accepts.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        words = re.compile(rf"\b({'|'.join(names)})\b")
        error.args = tuple(
            words.sub(lambda word: names[word[0]], argument.replace(" or sample_weight", ""))
            if isinstance(argument, str)
            else argument
            for argument in error.args
        )
        raise
