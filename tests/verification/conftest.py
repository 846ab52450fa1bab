"""Records what a run of the full form measures: a line of JSON in the file of `--record`."""

import datetime
import json
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from jax_bce import __version__


def processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether this run has the option `--record`: the long form of each test."""
    return request.config.getoption("record") is not None


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record("handlers", calls=1000)` appends the figures of a step to the file of `--record`."""
    file = request.config.getoption("record")

    def write(step: str, **figures: object) -> None:
        common = {
            "step": step,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "jax": version("jax"),
            "jaxlib": version("jaxlib"),
            "jax-bce": __version__,
            "device": processor(),
        }
        if file is not None:
            with Path(file).open("a") as stream:
                stream.write(json.dumps(common | figures) + "\n")

    return write
