"""Losses and gradients of fixed inputs have the bits that are stored, wherever they are computed.

On any number of threads, with any instruction set, Python and JAX; by the CUDA source on the host;
and gradients by a GPU. digest/stored.json changes only with the arithmetic itself:

    python tests/verification/digest/program.py cpu > tests/verification/digest/stored.json
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import platforms
import pytest

HERE = Path(__file__).parent / "digest"
STORED = json.loads((HERE / "stored.json").read_text())
# Of focal losses and second derivatives there is only the CPU's kernel.
ONLY_CPU = ("focal", "asymmetric", "second derivatives")
OF_CUDA = {name for name in STORED if not any(word in name for word in ONLY_CPU)}
WIDE = {name for name in OF_CUDA if "float32" in name or "float64" in name}


def digests(*arguments: object, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-P", HERE / "program.py", *map(str, arguments)],
        env=platforms.environment(str(arguments[0])) | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if "names an instruction set it does not have" in done.stderr:
        pytest.skip(f"this processor has no {environment['JAX_BCE_CPU']}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def different(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if STORED[name] != digest}


@pytest.mark.second
def test_this_machine(platform: str, record: Callable) -> None:
    """Of a GPU, the gradients of float32 and float64: the rest is as accurate, not the same."""
    found = digests(platform)
    assert set(found) == (OF_CUDA if platform == "cuda" else set(STORED))
    if platform == "cuda":
        found = {name: found[name] for name in WIDE if name.startswith("gradient")}
    assert different(found) == {}
    record(f"digest, {platform}", equal=len(found))


@pytest.mark.any_jax
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("threads", "instruction_set"),
    [(1, "x86-64-v3"), (7, "x86-64-v4"), (7, "aarch64")],
)
def test_threads_and_instruction_sets(
    cpu: str, full: bool, threads: int, instruction_set: str, record: Callable
) -> None:
    for number in (1, 2, 3, 7) if full else (threads,):
        found = digests(cpu, XLA_FLAGS="", NPROC=str(number), JAX_BCE_CPU=instruction_set)
        assert different(found) == {}
        record(f"digest, {number} threads, {instruction_set}", equal=len(found))


@pytest.mark.any_jax
@pytest.mark.thorough
def test_the_cuda_source_on_the_host(cpu: str, tmp_path: Path, record: Callable) -> None:
    """XLA calls it in the place of the CPU kernel."""
    root = HERE.parent.parent.parent
    tests, library = root / "tests", tmp_path / "cuda_on_host.so"
    flags = [
        "-O1",
        "-std=c++20",
        "-pthread",
        "-march=x86-64-v3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
    ]
    flags += ["-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-x", "c++"]
    folders = [tests / "cuda_kernel/on_host", tests / "verification/handlers/stub"]
    flags += [*(f"-I{folder}" for folder in folders), f"-isystem{jax.ffi.include_dir()}"]
    sources = [root / "csrc/bce_cuda.cu", HERE / "cuda_on_host.cc"]
    subprocess.run(
        ["g++", *flags, *map(str, sources), "-o", str(library)],
        check=True,
    )
    found = digests(cpu, library)
    assert set(found) == OF_CUDA
    found = {name: found[name] for name in WIDE}
    assert different(found) == {}
    record("digest, CUDA on the host", equal=len(found))
