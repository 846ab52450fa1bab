"""Who calls the package, and what they call its arguments."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Keras calls what it is given as a loss or a metric from these, with the labels first.
_LABELS_FIRST = ("keras.src.losses.", "keras.src.metrics.")


def caller(skipped: Callable[[str], bool]) -> tuple[str, int]:
    """The module of the first frame that is not skipped, and its stacklevel as seen from here."""
    frame, level = sys._getframe(1), 1
    while skipped(frame.f_globals.get("__name__", "")) and frame.f_back:
        frame, level = frame.f_back, level + 1
    return frame.f_globals.get("__name__", ""), level


def _takes_logits_first(module: str) -> bool:
    """Whether this is a function of the package that does, or what JAX wraps around one."""
    package = module.partition(".")[0]
    return package in ("jax_bce", "jax", "contextlib") and module != "jax_bce.keras"


def refuse_keras() -> None:
    """An error where Keras calls, as it would train on swapped arguments without a word."""
    module, _ = caller(_takes_logits_first)
    if module.startswith(_LABELS_FIRST):
        raise TypeError(
            "Keras passes y_true first, and this function takes it second: compile the model with "
            "jax_bce.keras.BinaryCrossentropy(from_logits=True) or BinaryFocalCrossentropy, or "
            "with a function such as lambda y_true, y_pred: jax_bce.loss(y_pred, y_true, axis=-1)."
        )


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors that are raised within use the caller's names of the arguments.

    They do not offer sample_weight, which no function of a drop-in has.
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
