"""What is installed is what the sources say, and no more, and anyone can build the same bytes."""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jax_bce import _kernels

pytestmark = pytest.mark.any_jax

ROOT = Path(__file__).parent.parent.parent
TRACKED = ("pyproject.toml", "CMakeLists.txt", "cuda.cmake", "sbom.cdx.json.in", "README.md")
FOLDERS = ("csrc", "src", "licenses")
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
SYSTEM |= {"libdl.so.2", "librt.so.1"}


def output(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def modules() -> list[Path]:
    return [Path(m.__file__) for m in (_kernels._cpu, _kernels._cuda) if m is not None]


@pytest.fixture(params=["cpu", "cuda"])
def module(request: pytest.FixtureRequest, require: Callable[[str], None]) -> Path:
    """The file of each built module."""
    require({"cpu": "cpu", "cuda": "gpu-code"}[request.param])
    return Path(getattr(_kernels, f"_{request.param}").__file__)


def test_exports(module: Path) -> None:
    """One symbol. Others could take the place of those of another module."""
    exported = re.findall(r" (\S) (\S+)$", output("nm", "-D", "--defined-only", module), re.M)
    assert exported == [("T", f"PyInit_{module.name.partition('.')[0]}")]


def test_dynamic_section(module: Path) -> None:
    """Bound at load and then read-only, no executable stack, no path of the build machine."""
    dynamic = output("readelf", "-dlW", module)
    assert "BIND_NOW" in dynamic
    assert "GNU_RELRO" in dynamic
    assert re.search(r"GNU_STACK .* RW +0x", dynamic)
    assert not re.search("RPATH|RUNPATH|TEXTREL", dynamic)
    needed = set(re.findall(r"Shared library: \[(.+)\]", dynamic))
    assert {name for name in needed if not name.startswith("ld-linux")} <= SYSTEM
    assert "__stack_chk_fail" in output("nm", "-D", module)
    strings = output("strings", "-n", "8", module)
    assert str(ROOT) not in strings


def copy(target: Path) -> Path:
    """The sources, at another place and with other times."""
    target.mkdir(parents=True)
    for name in (*TRACKED, "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignored, copy_function=shutil.copyfile)
    return target


def wheel(source: Path, target: Path, **environment: str) -> Path:
    """Built by pip in isolation: with nothing but the registry."""
    target.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", source],
        cwd=target,
        env=os.environ | {"JAX_BCE_CUDA": "OFF", "SOURCE_DATE_EPOCH": "1700000000"} | environment,
        check=True,
    )
    (found,) = target.glob("*.whl")
    return found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.config.getoption("record") is None:
        pytest.skip("in full only (make verify-supply): it builds wheels")
    folder = tmp_path_factory.mktemp("first")
    return wheel(copy(folder / "source"), folder / "dist")


@pytest.mark.thorough
def test_the_same_bytes(first: Path, tmp_path: Path, record: Callable) -> None:
    second = wheel(copy(tmp_path / "at" / "another" / "place"), tmp_path / "dist")
    assert first.name == second.name
    assert digest(first) == digest(second)
    record("supply, same bytes", wheel=first.name, builds=2, sha256=digest(first))


@pytest.mark.thorough
def test_source_distribution(first: Path, tmp_path: Path, record: Callable) -> None:
    """It builds, with nothing but the registry, into the very wheel that the tree does."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "JAX_BCE_CUDA": "OFF"}
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, copy(tmp_path / "tree")],
        env=environment,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "CMakeLists.txt", "cuda.cmake", "sbom.cdx.json.in"} <= names
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names)
    built = wheel(archive, tmp_path / "dist")
    assert digest(built) == digest(first)
    record("supply, source distribution", files=len(names), sha256=digest(archive))


@pytest.mark.thorough
def test_contents(first: Path, record: Callable) -> None:
    with zipfile.ZipFile(first) as file:
        names = file.namelist()
        bill = json.loads(file.read(next(n for n in names if n.endswith(".cdx.json"))))
        metadata = file.read(next(n for n in names if n.endswith("METADATA"))).decode()
    package = {f"jax_bce/{path.name}" for path in (ROOT / "src/jax_bce").glob("*.py*")}
    package |= {"jax_bce/py.typed"}
    compiled = {name for name in names if name.endswith(".so")}
    info = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert {name for name in names if ".dist-info/" not in name} == package | compiled
    assert [name.partition(".")[0] for name in compiled] == ["jax_bce/_cpu"]
    licenses = {"licenses/LICENSE", "licenses/licenses/pybind11.txt"}
    assert info == {"METADATA", "WHEEL", "RECORD", "sboms/jax_bce.cdx.json", *licenses}
    assert "License-Expression: Apache-2.0" in metadata
    parts = {part["name"]: part["version"] for part in bill["components"]}
    assert set(parts) == {"pybind11", "jaxlib"}
    assert f"jaxlib=={parts['jaxlib']}" in (ROOT / "pyproject.toml").read_text()
    licensed = [*bill["components"], bill["metadata"]["component"]]
    assert all(part["licenses"] for part in licensed)
    tag = re.search(r'"(manylinux_\S+)"', output(sys.executable, "-m", "auditwheel", "show", first))
    assert tag
    record(
        "supply, contents",
        files=len(names),
        compiled_in=[f"{name} {version}" for name, version in parts.items()],
        tag=tag[1],
    )


BENCHMARK = """
import json, sys, time
import jax, numpy as np
import jax_bce

times = {}
for size in (256, 4096, 2**20):
    x = np.random.default_rng(0).normal(0, 4, size).astype(np.float32)
    x, y = jax.device_put((x, (x > 0).astype(np.uint8)))
    call = jax.jit(jax_bce.loss_and_grad)
    jax.block_until_ready(call(x, y))
    rounds = max(10, 2**19 // size)
    found = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(rounds): results = call(x, y)
        jax.block_until_ready(results)
        found.append((time.perf_counter() - start) / rounds)
    times[size] = min(found)
print(json.dumps(times))
"""


@pytest.mark.thorough
def test_the_cost_of_hardening(first: Path, tmp_path: Path, record: Callable) -> None:
    """Times of the same calls with and without the flags, by turns; at most 5% on average."""
    plain = wheel(copy(tmp_path / "source"), tmp_path / "dist", JAX_BCE_HARDENED="OFF")
    times: dict[str, list[dict]] = {"hardened": [], "plain": []}
    for name, file in (("hardened", first), ("plain", plain)):
        zipfile.ZipFile(file).extractall(tmp_path / name)
    for _ in range(10):
        for name, found in times.items():
            done = subprocess.run(
                [sys.executable, "-P", "-c", BENCHMARK],
                env=os.environ | {"PYTHONPATH": str(tmp_path / name), "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(json.loads(done.stdout))
    best = {
        name: {size: min(one[size] for one in found) for size in found[0]}
        for name, found in times.items()
    }
    ratios = {size: best["hardened"][size] / best["plain"][size] for size in best["plain"]}
    record("supply, hardening", time_with_per_time_without=ratios)
    assert statistics.geometric_mean(ratios.values()) < 1.05
