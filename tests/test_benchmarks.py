"""The benchmark of the GPU, as far as a machine without one can run it: `--dry-run`, the parts."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.any_jax

FOLDER = Path(__file__).parent.parent / "benchmarks"
# As Nsight Compute prints it: its own lines, the program's, then a row for each kernel and metric.
CSV_HEAD = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / "gpu.py"), *arguments],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
def test_dry_run_writes_a_record_of_every_implementation(tmp_path: Path) -> None:
    case = ("--sizes", "14", "--only", "^value_and_grad, mean, bfloat16, uint8", "--seconds", "0")
    options = (*case, "--families", "jax", "--dry-run", "--output", "records.jsonl")
    done = run(*options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    records = {record["implementation"]: record for record in map(json.loads, lines)}
    assert set(records) == {
        *("jax_bce", "jax_bce, xla", "optax", "jnp", "jnp in bfloat16", "copy, XLA")
    }
    for record in records.values():
        assert "error" not in record
        assert record["dry_run"]
        assert record["n"] == 2**14
        assert record["calls_in_a_program"] == 64
        assert record["rounds"] >= 7
        assert record["median_ns_per_call"] > record["median_ns_per_element"] > 0
        assert "no CUDA graph" in record["timing"]
    assert records["jax_bce"]["times_jax_bce"] == 1
    assert records["copy, XLA"]["share_of_copy_bandwidth"] == 1

    again = run(*options, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "records.jsonl").read_text().splitlines() == lines


def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run("--families", "jax", "--output", "records.jsonl", folder=tmp_path)
    assert done.returncode == 1
    assert "no GPU" in done.stderr


def test_the_promised_cases_come_first_and_rotate_more_than_the_cache_holds(
    gpu: ModuleType,
) -> None:
    found = list(gpu.cases([10, 26, 30]))
    assert len(found) == len(set(found))
    assert [case.power for case in found[:2]] == [26, 30]
    assert {case.name for case in found[:6]} == {"value_and_grad, mean"}
    for case in found:
        assert 1 <= case.calls <= 64
        assert case.calls == 64 or case.calls * case.bytes_moved >= 4 * 126e6


class Device:
    """A clock, and a device that works in order while the host goes on."""

    def __init__(self) -> None:
        self.now = self.ready = 0.0

    def program(self, gpu: ModuleType, seconds: float) -> tuple:
        def enqueue() -> None:
            self.now += 1e-4
            self.ready = max(self.ready, self.now) + seconds

        def wait() -> None:
            self.now = max(self.now, self.ready)

        return gpu.Program(enqueue, wait, True)


def test_only_the_device_is_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay shorter than its dispatch: its calls take what the device needs for them."""
    device = Device()
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: device.now)
    programs = {"short": device.program(gpu, 2e-5), "long": device.program(gpu, 5e-3)}
    found = gpu.measure(programs, device.program(gpu, 2e-3), calls=2, seconds=0)
    assert found["short"]["seconds"] == pytest.approx([1e-5] * 7)
    assert found["long"]["seconds"] == pytest.approx([2.5e-3] * 7)
    assert found["short"]["dispatch"] == pytest.approx(5e-5)
    assert found["short"]["hidden"]
    assert found["short"]["replays"] > 7


def test_a_failing_implementation_leaves_the_others(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    device = Device()
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: device.now)
    programs = {"bad": gpu.Program(fails, fails, True), "good": device.program(gpu, 1e-3)}
    found = gpu.measure(programs, device.program(gpu, 2e-3), calls=1, seconds=0)
    assert found["bad"] == {"error": "RuntimeError: out of memory"}
    assert found["good"]["seconds"] == pytest.approx([1e-3] * 7)


def test_a_profile_is_the_sum_of_a_program_s_kernels(gpu: ModuleType) -> None:
    case = gpu.Case("value_and_grad", "mean", "float32", "float32", 22)
    kernels = ("first", "second") * case.calls
    rows = [
        f'"{i}","{kernel}","{metric}","byte","{value}"'
        for i, kernel in enumerate(kernels)
        for metric, value in zip(gpu.METRICS, ("4,194,304", "8388608", "1000"), strict=True)
    ]
    found = gpu.profile_of([*CSV_HEAD.splitlines(), *rows], case)
    assert found["kernels"] == ["first", "second"]
    assert found["bytes_read_per_element"] == 2
    assert found["bytes_written_per_element"] == 4
    assert found["kernel_ns_per_element"] == pytest.approx(2000 / 2**22)
    with pytest.raises(ValueError, match="no kernel"):
        gpu.profile_of(["==ERROR== ERR_NVGPUCTRPERM"], case)


def test_the_summary_names_where_xla_is_faster(gpu: ModuleType) -> None:
    common = {"case": "value_and_grad, mean", "dtype": "float32, float32 labels", "n": 2**26}
    times = {"jax_bce": [2.0], "jax_bce, xla": [1.5], "optax": [4.0], "copy, XLA": [1.0]}
    results = list(gpu.records(common, times, 12 * 2**26))
    results.append(common | {"implementation": "torch", "error": "out of memory"})
    printed = list(gpu.summary(results))
    table = next(part for part in printed if getattr(part, "title", "") == gpu.CHOICE)
    assert [list(column.cells) for column in table.columns][-1] == ["[red]0.75[/]"]
    assert "value_and_grad, mean, float32, float32 labels, n >= 2^26: 50% to 50% of copy " in str(
        printed
    )
    assert "no result: torch" in str(printed)
