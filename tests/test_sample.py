"""`make test` runs a sample of the cases, and CI runs every case."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sample

pytestmark = pytest.mark.any_jax

ROOT = Path(__file__).parent.parent
PARALLEL = ["-n", "auto", "--dist", "worksteal"]


def options_of(target: str) -> list[str]:
    """What `make` gives pytest for this target."""
    command = ["make", "--dry-run", f"PYTHON={sys.executable}", target]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"bin/pytest (.*)", done.stdout)
    return shlex.split(line)


def test_ci_runs_every_case(pytestconfig: pytest.Config) -> None:
    """No mark keeps a test from CI: `make test-all` deselects nothing."""
    assert "step make test-all " in (ROOT / ".ci" / "run").read_text()
    assert options_of("test-all") == [*PARALLEL, "--all"]
    assert options_of("test") == [*PARALLEL, "-m", "not second"]
    selecting = re.compile("-[mk]|--(ignore|deselect)")
    assert not [option for option in pytestconfig.getini("addopts") if selecting.match(option)]


def test_all_leaves_nothing_out(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "everything", True)
    thorough = pytest.Function.from_parent(request.node.parent, name="a", callobj=lambda: None)
    thorough.add_marker("thorough")
    items = [*request.session.items, thorough]
    assert sample.of(items) == items
    assert sample.examples(30) == 30
    monkeypatch.setattr(sample, "everything", False)
    assert thorough not in sample.of(items)
    assert sample.examples(30) == 6


def test_a_sample_has_every_test(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every value of each parameter, with every kernel that takes it."""
    monkeypatch.setattr(sample, "everything", False)
    items = [i for i in request.session.items if not i.get_closest_marker("thorough")]
    chosen = sample.of(items)
    assert {item.originalname for item in chosen} == {item.originalname for item in items}
    occurring, existing = (
        {(item.originalname, member) for item in each for member in sample.members(item)}
        for each in (chosen, items)
    )
    assert occurring == existing


@pytest.mark.parametrize("sizes", [(1,), (7,), (3, 5), (5, 3), (2, 4, 4)], ids=str)
def test_a_grid_takes_as_many_cases_as_its_longest_side(sizes: tuple[int, ...]) -> None:
    grid = [[*enumerate(case)] for case in itertools.product(*map(range, sizes))]
    chosen = sample.cover(grid)
    assert len(chosen) == max(sizes)
    seen = [member for place in chosen for member in grid[place]]
    assert set(seen) == set(itertools.chain(*grid))
    # The values of a parameter are used equally often, or nearly so.
    for parameter in range(len(sizes)):
        counts = [seen.count((parameter, value)) for value in range(sizes[parameter])]
        assert max(counts) - min(counts) <= 1


def test_a_test_without_parameters_is_chosen() -> None:
    assert sample.cover([[]]) == [0]
