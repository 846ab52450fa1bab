"""The handlers and kernels stay within their memory, whatever they are called with.

The sources are compiled with each sanitizer into a program that calls the handlers without XLA
(handlers/). Every array lies between two pages that fault, operands are read-only, and results have
the same bits at either end of their pages and on any number of threads. Those of CUDA are compiled
for the host.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import platforms
import pytest

pytestmark = [pytest.mark.any_jax, pytest.mark.thorough]

ROOT = Path(__file__).parent.parent.parent
SOURCES, HERE = ROOT / "csrc", Path(__file__).parent / "handlers"
CUDA_ON_HOST = ROOT / "tests" / "cuda_kernel" / "on_host"
FLAGS = ["-O1", "-g1", "-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
# Each instruction set's namespace and options, as in CMakeLists.txt.
SETS = {
    "x86-64-v3": ("baseline", ["-march=x86-64-v3"]),
    "x86-64-v4": ("avx512", ["-march=x86-64-v4", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]),
    "aarch64": ("baseline", []),
}
FIRST = "aarch64" if platform.machine() == "aarch64" else "x86-64-v3"
SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
ON_CUDA = ["-Og", "-std=c++20", "-DON_CUDA", "-Wno-unknown-pragmas", "-I", str(CUDA_ON_HOST)]
FUZZER = ["-fsanitize=fuzzer-no-link,address", "-DFUZZ"]


def build(
    folder: Path,
    sanitizers: str = "",
    sets: Sequence[str] = (FIRST,),
    compiler: str = "g++",
    options: Sequence[str] = (),
    cuda: bool = False,
) -> Path:
    """The program; one process for each source file."""
    flags = [*FLAGS, *options]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    if compiler != "g++":  # an older one warns of other things
        flags = [flag for flag in flags if not flag.startswith("-W")]
    test = ["-I", str(HERE / "stub"), "-isystem", jax.ffi.include_dir(), str(HERE / "test.cc")]
    single = FIRST != "aarch64" and len(sets) == 1 and not cuda
    one = ["-DONE_INSTRUCTION_SET"] if single else []
    jobs = {folder / "test.o": [*SETS[FIRST][1], *one, *test]}
    if cuda:
        flags += ON_CUDA
        jobs[folder / "bce_cuda.o"] = [*SETS[FIRST][1], "-x", "c++", str(SOURCES / "bce_cuda.cu")]
    for name in () if cuda else sets:
        space, own = SETS[name]
        for source in SOURCES.glob("bce_cpu_*.cc"):
            own_flags = [*own, f"-DBCE_INSTRUCTION_SET={space}"]
            jobs[folder / f"{source.stem}_{space}.o"] = [*own_flags, str(source)]

    def compile_one(target: Path) -> None:
        subprocess.run([compiler, *flags, "-c", *jobs[target], "-o", str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    program = folder / "program"
    link = [flag.replace("fuzzer-no-link", "fuzzer") for flag in flags if "-f" in flag]
    subprocess.run([compiler, *link, "-pthread", *map(str, jobs), "-o", str(program)], check=True)
    return program


def run(
    program: Path, *arguments: object, wrapped: Sequence[str] = (), instruction_set: str = FIRST
) -> Mapping[str, str]:
    """What it counted, after a look that nothing is wrong."""
    done = subprocess.run(
        [*wrapped, program, *map(str, arguments)],
        env=os.environ | {"JAX_BCE_CPU": instruction_set},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(
        r"on (?P<on>\S+): (?P<calls>\d+) calls, (?P<refused>\d+) refused, "
        r"(?P<compared>\d+) compared, 0 wrong, digest (?P<digest>\w+)",
        done.stdout,
    )
    assert found, done.stdout
    assert found["on"] == instruction_set
    return found.groupdict()


def modes(full: bool, sanitizer: str) -> list[tuple[object, ...]]:
    """The arguments of the runs. The thread sanitizer has only threads to look at."""
    threads: tuple[object, ...] = ("threads", 20 if full else 1)
    if sanitizer == "thread":
        return [threads]
    calls = 20_000 if full else 300
    every = 1 if sanitizer == "plain" else 3
    sizes, each = (every, 10) if full else (1021, 1)
    corpus = ("corpus", HERE / "corpus.txt")
    random = ("random", 1, calls)
    if sanitizer == "address" and not full:
        return [random, threads]
    return [("sizes", sizes), ("modifiers", each), random, corpus, threads]


@pytest.mark.parametrize(
    "sanitizer",
    [
        "plain",
        pytest.param("address", marks=pytest.mark.thorough),
        pytest.param("thread", marks=pytest.mark.thorough),
    ],
)
def test_sanitizers(cpu: str, tmp_path: Path, sanitizer: str, full: bool, record: Callable) -> None:
    # -Og compiles in half the time, and takes longer to run.
    program = build(tmp_path, SANITIZERS[sanitizer], options=[] if full else ["-Og"])
    counts = {mode[0]: run(program, *mode) for mode in modes(full, sanitizer)}
    assert all(int(count["compared"]) > 0 for count in counts.values())
    assert sanitizer == "thread" or int(counts["random"]["refused"]) > 0
    record(
        f"memory, {sanitizer}",
        calls=sum(int(count["calls"]) for count in counts.values()),
        compared=sum(int(count["compared"]) for count in counts.values()),
        sizes_apart=next((mode[1] for mode in modes(full, sanitizer) if mode[0] == "sizes"), None),
    )


@pytest.mark.thorough
def test_cuda_on_the_host(cpu: str, tmp_path: Path, full: bool, record: Callable) -> None:
    program = build(tmp_path, SANITIZERS["address"], cuda=True)
    runs = [
        ("sizes", 3 if full else 331),
        ("modifiers", 10 if full else 1),
        ("random", 1, 20_000 if full else 300),
        ("corpus", HERE / "corpus.txt"),
    ]
    counts = {each[0]: run(program, *each, instruction_set="cuda") for each in runs}
    assert all(int(count["compared"]) > 0 for count in counts.values())
    assert int(counts["random"]["refused"]) > 0
    record(
        "memory, CUDA",
        calls=sum(int(count["calls"]) for count in counts.values()),
        compared=sum(int(count["compared"]) for count in counts.values()),
    )


@pytest.mark.thorough
def test_instruction_sets(cpu: str, tmp_path: Path, full: bool, record: Callable) -> None:
    """The same bits of thousands of calls, element by element and summed."""
    flags = Path("/proc/cpuinfo").read_text()
    sets = [FIRST, "x86-64-v4"] if FIRST != "aarch64" and "avx512vl" in flags else [FIRST]
    if not full or len(sets) < 2:
        pytest.skip("in full only (make verify-memory), with two instruction sets")
    program = build(tmp_path, "address,undefined", sets)
    arguments = ("random", 2, 5000)
    counts = [run(program, *arguments, instruction_set=name) for name in sets]
    assert counts[0]["digest"] == counts[1]["digest"]
    record("memory, instruction sets", calls=int(counts[0]["calls"]), sets=" ".join(sets))


@pytest.mark.thorough
def test_valgrind(cpu: str, tmp_path: Path, full: bool, record: Callable) -> None:
    """Which sees a read of memory that nothing was written to. It knows no AVX-512."""
    if not full or not shutil.which("valgrind"):
        pytest.skip("in full only (make verify-memory), with valgrind on the PATH")
    program = build(tmp_path)
    wrapped = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full"]
    count = run(program, "random", 3, 1000, wrapped=wrapped)
    record("memory, valgrind", calls=int(count["calls"]))


@pytest.mark.thorough
def test_fuzzer(cpu: str, tmp_path: Path, full: bool, record: Callable) -> None:
    """libFuzzer chooses the calls, for ten minutes of a processor."""
    clang = next(filter(None, map(shutil.which, ("clang++", "clang++-14"))), None)
    if not full or not clang:
        pytest.skip("in full only (make verify-memory), with clang++ on the PATH")
    program = build(tmp_path, compiler=clang, options=FUZZER)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, line in enumerate((HERE / "corpus.txt").read_text().split()):
        (corpus / f"{number}").write_bytes(bytes.fromhex(line))
    began, calls, edges = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, 0, "0"
    seconds = 0.0
    while seconds < 600:
        options = ["-max_total_time=300", "-max_len=128", "-len_control=0", "-print_final_stats=1"]
        done = subprocess.run(
            [program, *options, corpus],
            cwd=tmp_path,
            env=os.environ | {"JAX_BCE_CPU": FIRST},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        calls += int(re.search(r"number_of_executed_units: (\d+)", done.stderr)[1])
        edges = re.findall(r"cov: (\d+)", done.stderr)[-1]
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    record("memory, libFuzzer", seconds=round(seconds), calls=calls, edges=int(edges))


@pytest.mark.thorough
def test_in_xla_under_a_preloaded_sanitizer(
    cpu: str, tmp_path: Path, full: bool, record: Callable
) -> None:
    """XLA calls the built module with AddressSanitizer: the tests of values and weights."""
    if not full:
        pytest.skip("in full only (make verify-memory): it builds another module")
    libraries = [  # the second for what the first intercepts
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    flags = "-fsanitize=address -fno-omit-frame-pointer"
    options = ["--no-deps", "--target", tmp_path, f"--config-settings=build-dir={tmp_path}/build"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *options, ROOT],
        env=os.environ | {"CXXFLAGS": flags, "JAX_BCE_CUDA": "OFF"},
        check=True,
    )
    tests = ["test_values.py", "test_weights.py", "test_errors.py", "test_dtypes_shapes.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT / "tests",
        env=platforms.environment("cpu")
        | {
            "PYTHONPATH": str(tmp_path),
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "JAX_BCE_REQUIRE": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    record("memory, preloaded", tests=int(passed[1]))
