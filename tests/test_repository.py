"""The files around the package agree with it and with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import jax_bce

pytestmark = pytest.mark.any_jax

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == jax_bce.__version__
    assert citation["license"] == project["license"]


def test_the_changelog_is_of_this_version(project: dict[str, Any]) -> None:
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in ("Unreleased", project["version"])


def test_the_classifiers_name_the_pythons_that_the_tests_run_on(project: dict[str, Any]) -> None:
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    tested = re.findall(r"^(?:floor|between|newest) := (3\.\d+)", MAKEFILE, re.MULTILINE)
    assert claimed == tested
    assert project["requires-python"] == f">={tested[0]}"


def test_the_makefile_has_the_oldest_jaxlib_of_each_python() -> None:
    """Those that pyproject.toml pins for the build."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pins = [Requirement(line) for line in build if line.startswith("jaxlib")]
    floors = re.findall(r"^floor(?:-\S+)? := (\S+) .*jaxlib(==\S+)", MAKEFILE, re.MULTILINE)
    assert len(floors) == len(pins)
    for version, pin in floors:
        chosen = [p for p in pins if p.marker and p.marker.evaluate({"python_version": version})]
        assert [str(p.specifier) for p in chosen] == [pin]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    commands = "\n".join(step["run"] for job in jobs for step in job["steps"] if "run" in step)
    targets = " ".join(re.findall(r"^\.PHONY:(.*)", MAKEFILE, re.MULTILINE)).split()
    assert set(re.findall(r"\bmake (\S+)", commands)) <= set(targets)
    for script in re.findall(r"(?:\.ci|tests)/[\w.]+", commands):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_hold_no_secret_and_write_only_where_they_publish(workflow: Path) -> None:
    """And publish only where a maintainer has switched that on."""
    text = workflow.read_text()
    assert "secrets." not in text
    parsed = yaml.safe_load(text)
    assert parsed["permissions"] == {"contents": "read"}
    for job in parsed["jobs"].values():
        if "permissions" in job:
            assert re.search(r"\bvars\.[A-Z]+ == 'true'", job["if"])


def test_the_wheels_test_command_runs_what_is_there() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    (script,) = re.findall(r"\{project\}/(\S+)", tool["test-command"])
    assert (ROOT / script).is_file()
