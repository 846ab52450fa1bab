"""Compares the speed of jax_bce on an NVIDIA GPU with what a user would call instead.

    python benchmarks/gpu.py --output h200.jsonl --budget 500
    python benchmarks/gpu.py --only 'mean, float32' --sizes 26 28
    python benchmarks/gpu.py --profile

The benchmark measures device time, not Python's dispatch. A program is one CUDA graph of K calls of
an implementation. A sample first starts the gate, a kernel that takes about two milliseconds. While
the gate keeps the device busy, the host enqueues replays of the program. The time of the gate alone
is subtracted. Each record states K, whether the program became a graph, the host's time per call to
start a replay, and whether all of that time was hidden behind the gate. At the smallest sizes, most
of the time is what a graph needs to launch a kernel.

Each of the K calls has its own operands and results, 512 MiB in total, so that the L2 cache holds
nothing that a call needs. K is at most 64: below about 2^18 elements the cache holds everything,
and bandwidth does not matter. Each round takes one sample of every implementation, in a rotating
order; medians are reported.

JAX and PyTorch run in separate processes, one case at a time, so that a crash loses only one case.
The most important cases come first, until `--budget` is spent. Records are written immediately, and
another run with the same `--output` continues where the last one ended. `--profile` counts the
bytes that each implementation moves, with Nsight Compute. Without a GPU, `--dry-run` runs
everything except the graphs on a CPU.
"""

import argparse
import csv
import datetime
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from gpu_cases import Case, Program
from records import RESULTS, Record, now, records, table_of, versions
from rich.console import Console
from rich.table import Table

FAMILIES = ("jax", "torch")
MAIN = (("float32", "float32"), ("bfloat16", "uint8"))
OTHERS = (
    ("bfloat16", "bfloat16"),
    ("float16", "uint8"),
    ("float32", "uint8"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)
TARGETS = {"float32, float32 labels": 0.9, "bfloat16, uint8 labels": 0.8}
SAMPLE_SECONDS = 0.01
CASE_SECONDS = 120  # a case that takes longer hangs
CHOICE = "time of implementation='xla' / time of the kernel: below 1, XLA should be the default"
PROFILED_POWER = 28  # so large that the share that stays in the L2 cache, uncounted, is small
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
PROFILED = ("jax_bce", "jax_bce, xla", "optax", "jnp", "torch", "torch.compile")

Found = dict[str, Record]  # a family's results, by implementation


def cases(powers: Iterable[int]) -> Iterator[Case]:
    """The most important first: the modes used in training, and the sizes with a target."""
    groups = [(MAIN, ("value_and_grad", "value"), "mean")]
    groups += [(MAIN, ("value_and_grad", "value"), reduction) for reduction in ("none", "rows")]
    groups += [(MAIN, ("value_and_grad",), "weighted")]
    groups += [(OTHERS, ("value_and_grad", "value"), "mean")]
    ordered = sorted(powers, key=lambda power: abs(power - 26))
    for dtypes, modes, reduction in groups:
        for mode, (logits, labels), power in itertools.product(modes, dtypes, ordered):
            yield Case(mode, reduction, logits, labels, power)


def _sample(gate: Program, program: Program | None, replays: int) -> tuple[float, float]:
    """Seconds until all work is done, and seconds the host needed to enqueue the replays."""
    start = time.perf_counter()
    gate.enqueue()
    opened = time.perf_counter()
    for _ in range(replays):
        program.enqueue()
    dispatched = time.perf_counter() - opened
    (program or gate).wait()
    return time.perf_counter() - start, dispatched


def _replays(gate: Program, program: Program) -> int:
    """As many as the host can enqueue while the gate runs, or fewer if they take long."""
    for _ in range(3):  # XLA makes the graph in one of the first calls
        program.enqueue()
    program.wait()
    shut = min(_sample(gate, None, 0)[0] for _ in range(3))
    both, dispatched = min(_sample(gate, program, 1) for _ in range(3))
    enough = SAMPLE_SECONDS / max(both - shut, 1e-6)
    return max(1, min(int(enough), int(0.7 * shut / dispatched), 16))


def measure(programs: dict[str, Program], gate: Program, calls: int, seconds: float) -> Found:
    """The seconds per call of each implementation, one number per round, and how it was timed."""
    found: Found = {}
    for name, program in programs.items():
        try:
            replays = _replays(gate, program)
            found[name] = {"graph": program.is_graph, "replays": replays, "seconds": []}
        except Exception as error:
            found[name] = {"error": _text(error)}
    names = [name for name, one in found.items() if "error" not in one]
    hosts: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while names and (rounds < 7 or time.perf_counter() < end):
        rounds += 1
        names.append(names.pop(0))
        for name in names:
            replays = found[name]["replays"]
            shut, _ = _sample(gate, None, 0)
            both, dispatched = _sample(gate, programs[name], replays)
            found[name]["seconds"].append((both - shut) / (replays * calls))
            hosts[name].append(dispatched / replays)
            found[name]["hidden"] = found[name].get("hidden", True) and dispatched < shut
    for name in names:
        found[name]["dispatch"] = statistics.median(hosts[name]) / calls
    return found


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def serve(family: str, seconds: float, connection: Connection) -> None:
    """Runs a family's process: sends its facts, then the measurements of each case."""
    module = importlib.import_module(f"gpu_{family}")
    connection.send(module.facts())
    gate = module.gate()
    while True:
        case = connection.recv()
        programs, failed = {}, {}
        try:
            for name, build in module.builders(case).items():
                try:
                    programs[name] = build()
                except Exception as error:
                    failed[name] = {"error": _text(error)}
            found = measure(programs, gate, case.calls, seconds) | failed
        except Exception as error:
            found = {family: {"error": _text(error)}}
        programs = build = None  # frees their buffers before the next case
        gc.collect()
        connection.send(found)


class Worker:
    """The process of a family, started again if it dies or hangs."""

    def __init__(self, family: str, seconds: float) -> None:
        self.family, self.seconds = family, seconds
        self.process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> dict[str, str]:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (self.family, self.seconds, theirs)
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()
        return self._answer()

    def measure(self, case: Case) -> Found:
        try:
            if self.process is None:
                self.start()
            self.connection.send(case)
            found = self._answer()
            if found and all("error" in one for one in found.values()):
                self.stop()  # after some errors, every CUDA call fails
            return found
        except (EOFError, OSError) as error:
            self.stop()
            return {self.family: {"error": _text(error)}}

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
        self.process = None

    def _answer(self) -> dict:
        if not self.connection.poll(CASE_SECONDS):
            raise TimeoutError(f"no answer after {CASE_SECONDS} s")
        return self.connection.recv()


def records_of(case: Case, facts: Record, found: Found) -> Iterator[Record]:
    common = facts | {
        "date": now(),
        "case": case.name,
        "dtype": case.dtype,
        "memory": f"{case.calls} sets of buffers in turn",
        "calls_in_a_program": case.calls,
        "n": case.n,
    }
    times = {name: one["seconds"] for name, one in found.items() if "error" not in one}
    for record in records(common, times, case.bytes_moved):
        one = found[str(record["implementation"])]
        yield record | {
            "median_ns_per_call": record["median_ns_per_element"] * case.n,
            "dispatch_ns_per_call": one["dispatch"] * 1e9,
            "dispatch_is_hidden": one["hidden"],
            "timing": f"{one['replays']} replays behind a busy kernel, of "
            + ("one CUDA graph" if one["graph"] else "a program (no CUDA graph)"),
        }
    for name, one in found.items():
        if "error" in one:
            yield common | {"implementation": name, "error": one["error"]}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return _text(error)


def choices(results: list[Record], peers: tuple[str, ...], title: str) -> Table:
    """The time of the fastest peer divided by the kernel's; below 1, the peer is faster."""
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        if str(result["implementation"]).startswith(peers) and result.get("times_jax_bce"):
            row = ratios.setdefault((result["case"], result["dtype"]), {})
            row[result["n"]] = min(row.get(result["n"], float("inf")), result["times_jax_bce"])
    sizes = sorted({n for row in ratios.values() for n in row})
    table = Table(title=title)
    for column in ("case", "dtype", *(f"2^{n.bit_length() - 1}" for n in sizes)):
        table.add_column(column)
    for names, row in ratios.items():
        cells = [f"{row[n]:.2f}" if n in row else "" for n in sizes]
        colours = ["red" if float(cell or 1) < 1 else "default" for cell in cells]
        coloured = [f"[{c}]{cell}[/]" for c, cell in zip(colours, cells, strict=True)]
        table.add_row(*names, *coloured)
    return table


def summary(results: list[Record]) -> Iterator[Table | str]:
    """The measurements, which implementation is faster at which size, and the two targets."""
    kinds = dict.fromkeys((result["case"], result["dtype"]) for result in results)
    for case, dtype in kinds:
        rows = [result for result in results if (result["case"], result["dtype"]) == (case, dtype)]
        yield table_of(f"{case}, {dtype}", rows)
    yield choices(results, ("jax_bce, xla",), CHOICE)
    yield choices(
        results,
        ("jax_bce, xla", "optax", "jnp"),
        "time of the fastest XLA version / time of the kernel",
    )
    for result in results:
        if "error" in result:
            where = f"{result['case']}, {result['dtype']}, n = {result['n']}"
            yield f"no result: {result['implementation']}, {where}: {str(result['error'])[:150]}"
    for dtype, target in TARGETS.items():
        for mode in ("value_and_grad", "value"):
            shares = [
                result["share_of_copy_bandwidth"]
                for result in results
                if (result["case"], result["dtype"]) == (f"{mode}, mean", dtype)
                and result["implementation"] == "jax_bce"
                and result["n"] >= 2**26
                and result.get("share_of_copy_bandwidth")
            ]
            share = "not measured"
            if shares:
                share = f"{min(shares):.0%} to {max(shares):.0%} of copy bandwidth"
            yield f"{mode}, mean, {dtype}, n >= 2^26: {share} (target {target:.0%})"


def measure_all(options: argparse.Namespace, output: Path, console: Console) -> None:
    workers = [Worker(family, options.seconds) for family in options.families]
    try:
        results = list(_measure_all(options, workers, output, console))
    finally:
        for worker in workers:
            worker.stop()
    for part in summary(results):
        console.print(part)


def _measure_all(
    options: argparse.Namespace, workers: list[Worker], output: Path, console: Console
) -> Iterator[Record]:
    """The records already in the output, then those of the missing cases."""
    deadline = time.monotonic() + options.budget
    facts: Record = {"driver": _driver(), "versions": versions(), "dry_run": options.dry_run}
    for worker in tuple(workers):
        try:
            facts = worker.start() | facts
        except (EOFError, OSError) as error:
            console.print(f"{worker.family} is left out because it did not start: {_text(error)}")
            worker.stop()
            workers.remove(worker)
    if facts.pop("platform", None) != "gpu" and not options.dry_run:
        sys.exit("JAX found no GPU; --dry-run runs on a CPU")
    lines = map(json.loads, output.read_text().splitlines() if output.exists() else ())
    earlier = [record for record in lines if "calls_in_a_program" in record]  # no profile
    yield from earlier
    done = {(record["case"], record["dtype"], record["n"]) for record in earlier}
    chosen = [
        case
        for case in cases(options.sizes)
        if re.search(options.only, f"{case.name}, {case.dtype}")
        and (case.name, case.dtype, case.n) not in done
    ]
    for index, case in enumerate(chosen):
        if time.monotonic() > deadline:
            console.print(f"the budget is spent: {len(chosen) - index} cases are left out")
            return
        console.print(f"{index + 1}/{len(chosen)}: {case.name}, {case.dtype}, 2^{case.power}")
        found: Found = {}
        for worker in workers:
            found |= worker.measure(case)
        with output.open("a") as file:
            for record in records_of(case, facts, found):
                file.write(json.dumps(record) + "\n")
                yield record


def call_under_profiler(name: str, case: Case) -> None:
    """Runs the program of one implementation, with the profiler on only for that."""
    import ctypes

    module = importlib.import_module(f"gpu_{'torch' if name.startswith('torch') else 'jax'}")
    program = module.builders(case)[name]()
    program.enqueue()
    program.wait()
    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    cuda.cuCtxSetCurrent(context)
    cuda.cuProfilerStart()
    program.enqueue()
    program.wait()
    cuda.cuProfilerStop()


def profile_of(lines: Iterable[str], case: Case) -> Record:
    """The kernels of a call and the bytes they move, from Nsight Compute's CSV output."""
    totals = dict.fromkeys(METRICS, 0.0)
    kernels = []
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        totals[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
        if row["Metric Name"] == METRICS[0]:
            kernels.append(row["Kernel Name"])
    if not kernels:
        raise ValueError("no kernel in the profile")
    read, written, nanoseconds = (totals[metric] / case.calls for metric in METRICS)
    return {
        "kernels": kernels[: len(kernels) // case.calls],
        "bytes_read_per_element": read / case.n,
        "bytes_written_per_element": written / case.n,
        "kernel_ns_per_element": nanoseconds / case.n,
    }


def profile(options: argparse.Namespace, output: Path, console: Console) -> None:
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    command = [tool, "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--profile-from-start", "off", "--clock-control", "none", sys.executable, __file__]
    deadline = time.monotonic() + options.budget
    profiled = 0
    for (logits, labels), name in itertools.product(MAIN, PROFILED):
        case = Case("value_and_grad", "mean", logits, labels, PROFILED_POWER)
        common = {"date": now(), "case": f"profile of {case.name}", "dtype": case.dtype}
        common |= {"versions": versions(), "driver": _driver(), "n": case.n, "implementation": name}
        left = min(CASE_SECONDS, deadline - time.monotonic())
        try:
            done = subprocess.run(
                [*command, "--call", name, logits, labels],
                capture_output=True,
                text=True,
                timeout=max(left, 1),
            )
            record = common | profile_of(done.stdout.splitlines(), case)
            profiled += 1
            console.print(
                f"{name}, {case.dtype}: {len(record['kernels'])} kernels, bytes per element: "
                f"{record['bytes_read_per_element']:.2f} read, "
                f"{record['bytes_written_per_element']:.2f} written"
            )
        except ValueError as error:
            output_of_ncu = (done.stdout + done.stderr)[-500:]
            record = common | {"error": f"{_text(error)}; output of ncu: {output_of_ncu}"}
        except (OSError, subprocess.TimeoutExpired) as error:
            record = common | {"error": _text(error)}
        if "error" in record:
            console.print(f"{name}, {case.dtype}: {record['error']}")
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if not profiled:
        sys.exit("nothing was profiled")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compare jax_bce with its peers on this GPU")
    sizes = (10, 14, 18, 22, 26, 28, 30)
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="powers of 2")
    parser.add_argument(
        "--only", default="", help="regular expression for the cases, e.g. 'mean, float32'"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case and family")
    parser.add_argument("--budget", type=float, default=360, help="seconds for all cases")
    parser.add_argument("--output", type=Path, help="JSON lines; default in benchmarks/results")
    parser.add_argument("--profile", action="store_true", help="count bytes with ncu instead")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, without graphs")
    parser.add_argument("--call", nargs=3, help=argparse.SUPPRESS)  # what ncu starts
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Read by XLA when it starts. PyTorch gets the same share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    if options.call:
        name, logits, labels = options.call
        case = Case("value_and_grad", "mean", logits, labels, PROFILED_POWER)
        call_under_profiler(name, case)
        return
    output = options.output or RESULTS / f"gpu-{datetime.date.today().isoformat()}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    (profile if options.profile else measure_all)(options, output, console)
    console.print(f"records: {output}")


if __name__ == "__main__":
    main()
