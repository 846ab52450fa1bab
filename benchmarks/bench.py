"""Compares the speed of jax_bce with what a user would call instead: `make bench`.

    python benchmarks/bench.py --sizes 10 18 25 --seconds 3

Each round takes one sample of every implementation, in a rotating order, so that other load on the
machine affects all of them alike. Medians are reported. A sample is a timed loop of calls, preceded
by one call that is not timed, so that the caches are in the same state as in the loop.

float32 logits and labels are measured at every size, other dtypes at the sizes of OTHER_SIZES, with
the gradient. Each size is measured on all cores, and on one core that the process is pinned to. The
records state how much more work a busy thread on each core does than a single one
("parallel_capacity").

`memory` says where the results go. "fresh" is the default: the C library maps every block above
32 MiB again for each call, and the first access to each page is a page fault. "warm" is a process
that keeps its memory (MALLOC_MMAP_MAX_=0).

Each line of the output is a complete record: see `records`. For GPUs, see gpu.py.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from records import RESULTS, Record, now, parallel_capacity, records, table_of, versions
from rich.console import Console
from rich.progress import track

MODES = ("value", "value_and_grad")
FLOAT32 = ("float32", "float32")
# Of logits and labels.
OTHERS = [
    (logits, labels)
    for logits in ("float32", "bfloat16", "float16")
    for labels in (logits, "uint8", "bool")
    if (logits, labels) != FLOAT32
]
OTHER_SIZES = (16, 18, 20, 22, 25)
SAMPLE_SECONDS = 2e-3
WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def measure(
    mode: str, n: int, dtypes: tuple[str, str], seconds: float, compiled_torch: bool
) -> dict[str, list[float]]:
    """Seconds per call of each implementation, one number per round."""
    from peers import implementations

    found = implementations(mode, n, dtypes, compiled_torch)
    calls = {}
    for name, implementation in found.items():
        implementation(), implementation()
        start = time.perf_counter()
        implementation()
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


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def records_of(mode: str, n: int, memory: str, options: argparse.Namespace) -> Iterator[Record]:
    from peers import bytes_moved

    from jax_bce.__main__ import report

    common = {
        "date": now(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "parallel_capacity": parallel_capacity(),
        "kernel": report()["cpu kernel"],
        "versions": versions(),
        "case": f"{mode}, mean",
        "memory": memory,
        "n": n,
    }
    for dtypes in OTHERS if options.others else [FLOAT32]:
        times = measure(mode, n, dtypes, options.seconds, options.compiled_torch)
        described = common | {"dtype": "{}, {} labels".format(*dtypes)}
        yield from records(described, times, bytes_moved(mode, *dtypes) * n)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compare jax_bce with its peers on this CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=range(10, 26), help="powers of 2")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and size")
    parser.add_argument("--output", type=Path, help="JSON lines; default in benchmarks/results")
    parser.add_argument(
        "--compiled-torch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure torch.compile, whose first use takes a C++ compiler and half a minute",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # run one case, in its own process
    parser.add_argument("--others", action="store_true", help=argparse.SUPPRESS)  # other dtypes
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.case:
        mode, memory, cores, power = options.case.split(",")
        if cores == "one":  # before JAX counts them
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for record in records_of(mode, 2 ** int(power), memory, options):
            print(json.dumps(record))
        return

    os.environ["JAX_PLATFORMS"] = "cpu"
    output = options.output or RESULTS / f"cpu-{datetime.date.today().isoformat()}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    # The C library reuses the memory of small results anyway.
    cases = [
        (mode, "fresh", cores, power, [])
        for mode in MODES
        for cores in ("all", "one")
        for power in options.sizes
    ]
    cases += [
        ("value_and_grad", "warm", "all", power, []) for power in options.sizes if power >= 22
    ]
    cases += [
        ("value_and_grad", "fresh", cores, power, ["--others"])
        for cores in ("all", "one")
        for power in options.sizes
        if power in OTHER_SIZES
    ]
    command = [sys.executable, __file__, "--seconds", str(options.seconds)]
    command += [] if options.compiled_torch else ["--no-compiled-torch"]
    results: list[Record] = []
    with output.open("w") as file:
        console = Console(stderr=True)
        for mode, memory, cores, power, others in track(cases, "measuring", console=console):
            done = subprocess.run(
                [*command, "--case", f"{mode},{memory},{cores},{power}", *others],
                env=os.environ | (WARM_MEMORY if memory == "warm" else {}),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            file.write(done.stdout)
            results += map(json.loads, done.stdout.splitlines())
    console = Console(width=150)
    tables: dict[str, list[Record]] = {}
    for result in results:
        cores = f"{result['cores']} cores" if result["cores"] != 1 else "one core"
        title = f"{result['case']}, {result['dtype']}, {result['memory']} memory, {cores}"
        tables.setdefault(title, []).append(result)
    for title, rows in tables.items():
        console.print(table_of(title, rows))
    capacity = max(float(str(result["parallel_capacity"])) for result in results)
    console.print(f"Busy threads on all cores do {capacity:.2f} times the work of one thread.")
    if all(result["implementation"] != "torch" for result in results):
        console.print("PyTorch is not installed and is left out.")
    console.print(f"records: {output}")


if __name__ == "__main__":
    main()
