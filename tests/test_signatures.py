"""What `help`, `dir` and an editor show of the public functions."""

import inspect
import subprocess
import sys

import pytest

import jax_bce
from jax_bce import _arguments

pytestmark = pytest.mark.any_jax

WITH_KEYWORDS = ("loss_and_grad", "focal_loss", "asymmetric_loss", "loss_from_probs")


@pytest.mark.parametrize("name", sorted({*jax_bce.__all__} - {"checking"}))
def test_help_shows_names_and_not_what_they_stand_for(name: str) -> None:
    line = f"{name}{inspect.signature(getattr(jax_bce, name))}"
    assert "Union" not in line
    assert "numpy" not in line
    assert len(line) < 800


@pytest.mark.parametrize("name", WITH_KEYWORDS)
def test_help_shows_the_real_keywords(name: str) -> None:
    shown = inspect.signature(getattr(jax_bce, name)).parameters
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    of_loss = inspect.signature(jax_bce.loss).parameters
    for keyword in _arguments.Keywords.__annotations__:
        assert shown[keyword].default == of_loss[keyword].default
        assert shown[keyword].annotation == of_loss[keyword].annotation


def test_dir_shows_the_drop_ins_before_they_are_imported() -> None:
    script = (
        "import sys, jax_bce\n"
        "print({'keras', 'optax', 'torch_like', 'loss'} <= set(dir(jax_bce)))\n"
        "print('jax_bce.keras' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
