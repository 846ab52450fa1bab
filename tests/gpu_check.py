"""What a machine with an NVIDIA GPU can tell of this commit, in one record: `make gpu-check`.

    python tests/gpu_check.py
    python tests/gpu_check.py --steps build,driver --limit 500 --record check.jsonl
    python tests/gpu_check.py --steps tests --limit 500 --record check.jsonl  # goes on with it

Needs no network: the build is not isolated and takes the packages that are there. A step that fails
or takes too long does not end the run: its result is a line of the record, written at once, and
its output is in the log beside the record.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO
from xml.etree import ElementTree


def cuda_tool(name: str) -> str | None:
    """Of the CUDA toolkit, on the PATH or not."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ["PATH"], f"{toolkit}/bin", f"{toolkit}/compute-sanitizer"]
    return shutil.which(name, path=os.pathsep.join(folders))


ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/gpu-check"
# On PYTHONPATH, not a virtual environment: that would not see the packages of another one.
SITE = BUILD / "site"
KERNEL_TESTS = ROOT / "tests/cuda_kernel"
NVCC = cuda_tool("nvcc") or "nvcc"
# As in cuda.cmake; and the CPU kernel's as in CMakeLists.txt.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Werror", "all-warnings"]
NVCC_FLAGS += ["-DBCE_INSTRUCTION_SET=baseline", "-Xcompiler"]
NVCC_FLAGS += ["-Wall,-Wextra,-Wno-unknown-pragmas,-ffp-contract=off,-fno-math-errno"]
if platform.machine() == "x86_64":
    NVCC_FLAGS[-1] += ",-march=x86-64-v3"


@dataclass
class Result:
    """A line of the record."""

    step: str
    command: str = ""
    status: str = "not run"  # passed, failed, timed out
    why: str = ""
    seconds: float = 0.0
    findings: dict[str, object] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)


class Check:
    """Runs the commands of the steps and keeps the record."""

    def __init__(self, record: Path, seconds: float, dry_run: bool, pytest: str = "") -> None:
        self.record, self.log = record, record.with_suffix(".log")
        self.dry_run, self.pytest = dry_run, pytest
        self.kernel = "cpu" if dry_run else "cuda"
        self.deadline = time.monotonic() + seconds
        self.results: list[Result] = []
        self.output = ""  # of the last command
        record.parent.mkdir(parents=True, exist_ok=True)

    def seconds_for(self, limit: float) -> float:
        return min(limit, self.deadline - time.monotonic())

    def run(
        self, step: str, command: Sequence[str | Path], limit: float, **environment: str
    ) -> Result:
        """Runs the command for at most so many seconds. Its result is not yet written."""
        result = Result(step, shlex.join(map(str, command)))
        self.output = ""
        limit = self.seconds_for(limit)
        if limit < 1:
            result.why = "the time is up"
            return result
        python_path = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PATH": os.pathsep.join([os.environ["PATH"], str(Path(NVCC).parent)]),
            "PYTHONPATH": os.pathsep.join(python_path),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the GPU
        } | environment
        print(f"{step} ...", flush=True)
        start = time.monotonic()
        with self.log.open("ab+") as log:
            log.write(f"\n==> {step}: {result.command}\n".encode())
            log.flush()
            begin = log.seek(0, os.SEEK_END)
            try:
                self.wait_for(command, environment, log, limit, result)
            except OSError as error:
                result.why = str(error)
            log.seek(begin)
            self.output = log.read().decode(errors="replace")
        result.seconds = round(time.monotonic() - start, 1)
        result.last_lines = [line[:300] for line in self.output.splitlines()[-30:]]
        return result

    @staticmethod
    def wait_for(
        command: Sequence[str | Path],
        environment: dict[str, str],
        log: IO[bytes],
        limit: float,
        result: Result,
    ) -> None:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            code = process.wait(limit)
            result.status = "failed" if code else "passed"
            result.why = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            result.status, result.why = "timed out", f"after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children too
                process.wait()

    def write(self, result: Result) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps(
            {"date": date, "dry_run": self.dry_run} | asdict(result), ensure_ascii=False
        )
        # Where things lie on this machine is of no use elsewhere.
        names = {sys.executable: "python", sys.prefix: "(python)", f"{ROOT}/": "", str(ROOT): "."}
        for path, name in names.items():
            line = line.replace(path, name)
        with self.record.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.results.append(result)
        print(f"{result.step}: {result.status} {result.why}".rstrip(), flush=True)


def output_of(*command: str) -> str:
    """What a command prints, or why it could not."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none: {error}"
    text = done.stdout.strip()
    if done.returncode == 0:
        return text
    return f"none: {(text + done.stderr).strip().rpartition(chr(10))[2]}"


def gpu() -> str:
    """The first GPU's name, as its driver tells it or, without nvidia-smi, JAX."""
    name = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if name and not name.startswith("none: "):
        return name.splitlines()[0]
    ask_jax = "import jax; print(jax.devices('cuda')[0].device_kind)"
    return output_of(sys.executable, "-c", ask_jax)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def facts(check: Check) -> None:
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "optax")
    digest = hashlib.sha256()
    for source in sorted((ROOT / "csrc").iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    query = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem,clocks.max.sm"
    findings = {
        "gpu": gpu(),
        "nvidia-smi": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "nvcc": output_of(NVCC, "--version").splitlines()[-1],
        "host compiler": output_of("g++", "--version").splitlines()[0],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed since": output_of("git", "status", "--short").splitlines(),
        "csrc": digest.hexdigest(),
    }
    check.write(Result("facts", status="passed", findings=findings))


def build(check: Check) -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--target", SITE)
    command = (sys.executable, "-m", "pip", "install", "-v", *options, ".")
    result = check.run("build", command, 400, JAX_BCE_CUDA="ON")
    result.findings["decided"] = re.findall(r"jax_bce: .*", check.output)
    check.write(result)


# loss, then kernel, then where the package lies.
TINY_LOSS = """
import math, sys
import jax, jax.numpy as jnp
import jax_bce
kernel, site = sys.argv[1:]
assert jax_bce.__file__.startswith(site), jax_bce.__file__
x, y = jnp.array([0.0, 2.0, -30.0]), jnp.array([1.0, 0.0, 1.0])
loss = lambda x: jax_bce.loss(x, y, implementation=kernel)
value, gradient = jax.jit(jax.value_and_grad(loss))(x)
exact = (math.log(2) + 2 + math.log1p(math.exp(-2)) + 30 + math.log1p(math.exp(-30))) / 3
slopes = [-0.5 / 3, 1 / (1 + math.exp(-2)) / 3, -1 / (1 + math.exp(-30)) / 3]
print(value, exact, gradient, slopes, value.devices())
assert abs(float(value) - exact) <= 2**-23 * exact
assert all(abs(float(g) - s) <= 2**-23 * abs(s) for g, s in zip(gradient, slopes))
"""


def loaded(check: Check) -> None:
    result = check.run("loaded", (sys.executable, "-m", "jax_bce"), 120)
    lines = (line.partition("  ") for line in check.output.splitlines())
    result.findings = {name: value.strip() for name, _, value in lines if value}
    expected = {
        f"{check.kernel} kernel": "loaded",
        "default platform": "cpu" if check.dry_run else "gpu",
    }
    wrong = [
        f"{name} is not {start}"
        for name, start in expected.items()
        if not str(result.findings.get(name, "")).startswith(start)
    ]
    if result.status == "passed" and wrong:
        result.status, result.why = "failed", "; ".join(wrong)
    check.write(result)
    command = (sys.executable, "-c", TINY_LOSS, check.kernel, SITE)
    check.write(check.run("loaded: a loss", command, 120))


def driver(check: Check) -> None:
    """The kernels without XLA, under NVIDIA's sanitizers too."""
    BUILD.mkdir(parents=True, exist_ok=True)
    kernels = [ROOT / "csrc/bce_cuda.cu", *sorted((ROOT / "csrc").glob("bce_cpu_*.cc"))]
    sources = [*kernels, KERNEL_TESTS / "test.cc", KERNEL_TESTS / "device.cc"]
    architecture = "-arch=sm_90" if check.dry_run else "-arch=native"
    commands = [[NVCC, *NVCC_FLAGS, architecture, "-c", *sources, "-odir", BUILD]]
    for name in ("test", "device"):
        objects = [BUILD / f"{part}.o" for part in (*(source.stem for source in kernels), name)]
        (BUILD / name).unlink(missing_ok=True)
        commands.append([NVCC, architecture, *objects, "-o", BUILD / name])
    script = " && ".join(shlex.join(map(str, command)) for command in commands)
    check.write(check.run("driver: compiled", ("sh", "-c", script), 200))
    absent = None if (BUILD / "device").exists() else "it did not compile"
    absent = "dry run" if check.dry_run else absent

    programs = [["test", "1"], ["device", "streams"], ["device", "capture"], ["device", "large"]]
    for program, argument in programs:
        step = f"driver: {program} {argument}"
        if absent:
            check.write(Result(step, why=absent))
            continue
        result = check.run(step, (BUILD / program, argument), 150)
        if "not run, as" in check.output:
            result.status, result.why = "not run", check.output.strip().rpartition("not run, ")[2]
        check.write(result)

    sanitizer = cuda_tool("compute-sanitizer")
    absent = absent or (None if sanitizer else "there is no compute-sanitizer")
    for tool in ("memcheck", "initcheck", "racecheck"):
        if absent:
            check.write(Result(f"driver: {tool}", why=absent))
            continue
        command = (sanitizer, "--tool", tool, "--error-exitcode", "9", BUILD / "test", "0")
        result = check.run(f"driver: {tool}", command, 200)
        result.findings["summary"] = re.findall(r".* SUMMARY: .*", check.output)
        if refusal := re.search(r"=+ .*(not supported|LibraryNotLoaded).*", check.output):
            result.status, result.why = "not run", refusal[0]
        elif result.status == "passed" and not result.findings["summary"]:
            result.status, result.why = "failed", "it came to no summary"
        check.write(result)


def outcomes(report: Path) -> dict[str, object]:
    """Failures by name; apart, those for want of a package that this machine lacks."""
    passed, skipped = 0, Counter[str]()
    failed, lacking = [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        problems = [p for p in case if p.tag in ("failure", "error")]
        text = "".join(f"{p.get('message')} {p.text}" for p in problems)
        missing = re.search(r"No module named '(?!jax_bce)([^']*)'", text)
        if missing:
            lacking[name] = missing[1]
        elif problems:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped[str(skip.get("message"))[:200]] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "lacking": lacking, "skipped": dict(skipped)}


def tests(check: Check) -> None:
    if not importlib.util.find_spec("pytest"):
        check.write(Result("tests", why="pytest is not installed"))
        return
    report = BUILD / "tests.xml"
    report.unlink(missing_ok=True)
    # What runs on the host needs no GPU machine: the driver runs the same program on the GPU, eight
    # devices are a CPU's, and the peers need packages that such a machine may lack.
    elsewhere = "source_on_the_host or test_meshes or test_shard_map or test_multiprocess"
    options = ["-v", "--all", f"--junitxml={report}", "-k", f"not ({elsewhere})"]
    elsewhere_too = ("conformance", *(f"verification/test_{n}.py" for n in ("life", "memory")))
    options += [f"--ignore=tests/{path}" for path in elsewhere_too]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(len(os.sched_getaffinity(0)))]
    command = (sys.executable, "-m", "pytest", *options, *shlex.split(check.pytest))
    required = "cpu" if check.dry_run else "cpu,cuda"
    result = check.run("tests", command, 900, JAX_BCE_REQUIRE=required)
    if report.exists():
        result.findings = outcomes(report)
        # 1: tests failed, rather than pytest.
        if result.why == "exit status 1" and not result.findings["failed"]:
            result.status, result.why = "passed", "but for tests whose packages are lacking"
    else:  # as far as it came
        result.findings = {"failed": re.findall(r"(?:FAILED|ERROR) (tests/.*)", check.output)}
    check.write(result)


def exhaustive(check: Check) -> None:
    command = [sys.executable, "tests/exhaustive.py", "--implementation", check.kernel]
    result = check.run("exhaustive", command + ["--stride", "65536"] * check.dry_run, 400)
    result.findings["table"] = re.findall(r"^\|.*", check.output, re.MULTILINE)
    check.write(result)


def benchmark(check: Check) -> None:
    records = check.record.with_name(check.record.stem + "-benchmark.jsonl")
    # A quarter for what it does around the measuring.
    budget = max(10, round(0.75 * check.seconds_for(40 if check.dry_run else 600)))
    command = [sys.executable, "benchmarks/gpu.py", "--output", records, "--budget", str(budget)]
    result = check.run("benchmark", command + ["--sizes", "10", "--dry-run"] * check.dry_run, 600)
    result.findings["acceptance"] = re.findall(r".*of copy bandwidth.*", check.output)
    check.write(result)


def profile(check: Check) -> None:
    if check.dry_run or not cuda_tool("ncu"):
        check.write(Result("profile", why="dry run" if check.dry_run else "there is no ncu"))
        return
    records = check.record.with_name(check.record.stem + "-benchmark.jsonl")
    command = (sys.executable, "benchmarks/gpu.py", "--profile", "--output", records)
    result = check.run("profile", command, 300)
    result.findings["moved"] = re.findall(r".*bytes per element.*", check.output)
    check.write(result)


STEPS: dict[str, Callable[[Check], None]] = {
    step.__name__: step
    for step in (facts, build, loaded, driver, tests, exhaustive, benchmark, profile)
}


def print_table(results: list[Result]) -> None:
    rows = [(r.step, r.status, f"{r.seconds:.1f}", r.why) for r in results]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in rows:
            print("{:24} {:10} {:>7} s  {}".format(*row))
        return
    table = Table()
    for column in ("step", "result", "seconds", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def steps_of(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(STEPS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(STEPS)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=steps_of, default=list(STEPS), help=",".join(STEPS))
    parser.add_argument("--limit", type=float, default=1500, help="seconds for all steps")
    parser.add_argument("--record", type=Path, help="JSON lines; a file that exists is continued")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, as one string")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, what runs on a CPU")
    options = parser.parse_args()
    device = gpu()
    if device.startswith("none: ") and not options.dry_run:
        print(f"There is no NVIDIA GPU here: {device.removeprefix('none: ')}", file=sys.stderr)
        return 2
    name = "dry-run" if options.dry_run else re.sub("[^a-z0-9]+", "-", device.lower())
    default = f"benchmarks/results/gpu-check-{name}-{datetime.date.today().isoformat()}.jsonl"
    record = (options.record or ROOT / default).absolute()
    check = Check(record, options.limit, options.dry_run, options.pytest)
    for step in options.steps:
        try:
            STEPS[step](check)
        except Exception as error:  # of this script: the other steps are worth having all the same
            check.write(Result(step, status="failed", why=f"{type(error).__name__}: {error}"))
    print_table(check.results)
    print(f"record: {record}\nlog: {check.log}")
    return int(any(result.status in ("failed", "timed out") for result in check.results))


if __name__ == "__main__":
    sys.exit(main())
