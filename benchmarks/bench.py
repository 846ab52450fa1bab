"""Speed against everything a user would call instead, in one run: `make bench`.

    python benchmarks/bench.py --sizes 10 18 25 --seconds 3

Every round takes one sample of every contestant, in a rotating order, so that what else happens on
the machine hits all of them alike; reported are medians. A sample is a loop of calls after one that
is not timed: its operands are where a loop that calls it again and again has them.

`memory` says where the results go: "fresh" is what a program gets by default, where the C library
maps every block above 32 MiB anew and each first touch of a page is a fault; "warm" is a process
that keeps its memory (MALLOC_MMAP_MAX_=0).

A line of the output is a full record: see `record`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MODES = ("value", "value_and_grad")
SAMPLE_SECONDS = 2e-3
WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Record = dict[str, object]


def measure(mode: str, n: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each contestant, one number a round."""
    from peers import contestants

    found = contestants(mode, n)
    calls = {}
    for name, contestant in found.items():
        contestant(), contestant()
        start = time.perf_counter()
        contestant()
        calls[name] = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    end = time.perf_counter() + seconds
    while len(times[names[-1]]) < 7 or time.perf_counter() < end:
        names.append(names.pop(0))
        for name in names:
            found[name]()
            start = time.perf_counter()
            for _ in range(calls[name]):
                found[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("jax-bce", "jax", "jaxlib", "optax", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def records(mode: str, n: int, memory: str, seconds: float) -> Iterator[Record]:
    from peers import BYTES

    from jax_bce.__main__ import report

    times = measure(mode, n, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy = min(seconds for name, seconds in medians.items() if name.startswith("copy"))
    facts = report()
    for name, values in times.items():
        yield {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "kernel": facts["cpu kernel"],
            "versions": _versions(),
            "case": f"{mode}, mean",
            "dtype": "float32, float32 labels",
            "memory": memory,
            "n": n,
            "contestant": name,
            "rounds": len(values),
            "median_ns_per_element": medians[name] / n * 1e9,
            "min_ns_per_element": min(values) / n * 1e9,
            "gigabytes_per_second": BYTES[mode] * n / medians[name] / 1e9,
            "share_of_copy_bandwidth": copy / medians[name],
            "times_jax_bce": medians[name] / medians["jax_bce"],
        }


def table_of(mode: str, memory: str, results: list[Record]) -> Table:
    table = Table(title=f"{mode}(mean), float32, {memory} memory: ns an element, and times jax_bce")
    rows: dict[int, dict[str, Record]] = {}
    for result in results:
        if (result["case"], result["memory"]) == (f"{mode}, mean", memory):
            rows.setdefault(int(str(result["n"])), {})[str(result["contestant"])] = result
    names = list(next(iter(rows.values()))) if rows else []
    for column in ("n", *names, "jax_bce: GB/s, share of copy"):
        table.add_column(column, justify="right")
    for n, row in rows.items():
        cells = [
            f"{result['median_ns_per_element']:.3g}"
            + ("" if name == "jax_bce" else f" ({result['times_jax_bce']:.2g}x)")
            for name, result in row.items()
        ]
        ours = row["jax_bce"]
        share = f"{ours['gigabytes_per_second']:.3g}, {ours['share_of_copy_bandwidth']:.0%}"
        table.add_row(f"2^{n.bit_length() - 1}", *cells, share)
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="jax_bce against its peers on this CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=range(10, 26), help="powers of 2")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and size")
    parser.add_argument("--output", type=Path, help="JSON lines; default in benchmarks/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.case:
        mode, memory, power = options.case.split(",")
        for record in records(mode, 2 ** int(power), memory, options.seconds):
            print(json.dumps(record))
        return

    os.environ["JAX_PLATFORMS"] = "cpu"
    output = options.output or RESULTS / f"cpu-{datetime.date.today().isoformat()}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    # Where results are small, the C library reuses their memory anyway.
    cases = [(mode, "fresh", power) for mode in MODES for power in options.sizes]
    cases += [("value_and_grad", "warm", power) for power in options.sizes if power >= 22]
    command = [sys.executable, __file__, "--seconds", str(options.seconds)]
    results: list[Record] = []
    with output.open("w") as file:
        for mode, memory, power in track(cases, "measuring", console=Console(stderr=True)):
            done = subprocess.run(
                [*command, "--case", f"{mode},{memory},{power}"],
                env=os.environ | (WARM_MEMORY if memory == "warm" else {}),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            file.write(done.stdout)
            results += map(json.loads, done.stdout.splitlines())
    console = Console(width=150)
    for mode, memory in dict.fromkeys((mode, memory) for mode, memory, _ in cases):
        console.print(table_of(mode, memory, results))
    if all(result["contestant"] != "torch" for result in results):
        console.print("PyTorch is not installed, so it is left out.")
    console.print(f"records: {output}")


if __name__ == "__main__":
    main()
