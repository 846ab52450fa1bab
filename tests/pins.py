"""Whether every build requirement has a wheel for each Python: `make pins`. It needs the network.

For another Python, pip chooses wheels by their tags, but evaluates markers and Requires-Python for
its own. So markers are evaluated here, and the tag of a wheel says whether it is for that Python.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")


def requirements() -> list[Requirement]:
    """Those of every build, and those that JAX_BCE_CUDA=PYPI adds."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    overrides = project["tool"]["scikit-build"]["overrides"]
    added = [name for override in overrides for name in override["build"]["requires"]]
    return [Requirement(text) for text in (*project["build-system"]["requires"], *added)]


def chosen(python: str) -> list[str]:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return [
        f"{requirement.name}{requirement.specifier}"
        for requirement in requirements()
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]


def main() -> None:
    for python in PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
            command += ["--disable-pip-version-check", "--only-binary=:all:", "--target", folder]
            command += ["--ignore-requires-python"]
            subprocess.run([*command, "--python-version", python, *chosen(python)], check=True)
        print(f"Python {python}: {', '.join(chosen(python))}")


if __name__ == "__main__":
    main()
