"""`make gpu-check` where there is no GPU: its record is kept whatever the steps do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest

pytestmark = pytest.mark.any_jax

NO_GPU = {"JAX_PLATFORMS": "cpu", "PATH": ""}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, gpu_check.__file__, *arguments]
    return subprocess.run(command, env=os.environ | NO_GPU, capture_output=True, text=True)


def test_no_gpu(tmp_path: Path) -> None:
    done = run("--record", str(tmp_path / "record.jsonl"))
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_record_is_continued(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    for limit in ("60", "0"):
        done = run(
            "--dry-run", "--steps", "facts,exhaustive", "--limit", limit, "--record", str(record)
        )
        assert done.returncode == 0, done.stdout + done.stderr
    facts, exhaustive, _, too_late = map(json.loads, record.read_text().splitlines())
    assert facts["findings"]["gpu"].startswith("none")
    assert (exhaustive["status"], len(exhaustive["findings"]["table"])) == ("passed", 12)
    assert (too_late["status"], too_late["why"]) == ("not run", "the time is up")


@pytest.mark.parametrize(
    ("command", "status", "why"),
    [
        (["sh", "-c", "echo said"], "passed", ""),
        (["sh", "-c", "echo said; exit 3"], "failed", "exit status 3"),
        (["sh", "-c", "echo said; sleep 60"], "timed out", "after 2 s"),
        (["no-such-program"], "not run", "No such file"),
    ],
    ids=["passed", "failed", "timed-out", "absent"],
)
def test_a_step(tmp_path: Path, command: list[str], status: str, why: str) -> None:
    check = gpu_check.Check(tmp_path / "record.jsonl", 60, dry_run=True)
    result = check.run("step", command, 2)
    check.write(result)
    assert (result.status, result.last_lines) == (status, [] if status == "not run" else ["said"])
    assert why in result.why
    assert json.loads(check.record.read_text())["status"] == status
    assert "==> step: " in check.log.read_text()


def test_lacking_packages_are_no_failure(tmp_path: Path) -> None:
    cases = {
        "one": "",
        "two": "<failure message='ModuleNotFoundError: No module named &#39;keras&#39;'/>",
        "three": "<failure message='assert 1 == 2'/>",
        "four": "<skipped message='not here'/>",
        "five": "<error>ImportError: No module named 'jax_bce._cuda'</error>",
    }
    text = "".join(f"<testcase classname='t' name='{n}'>{p}</testcase>" for n, p in cases.items())
    report = tmp_path / "tests.xml"
    report.write_text(f"<testsuite>{text}</testsuite>")
    assert gpu_check.outcomes(report) == {
        "passed": 1,
        "failed": ["t.three", "t.five"],
        "lacking": {"t.two": "keras"},
        "skipped": {"not here": 1},
    }
