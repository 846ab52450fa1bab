"""The records that bench.py and gpu.py write, and tables of them."""

import datetime
import hashlib
import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Record = dict[str, object]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("jax-bce", "jax", "jaxlib", "optax", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def parallel_capacity() -> float:
    """How many times the work of a single busy thread is done by a busy thread on each core.

    It should be the number of cores, but some machines run all threads of a process on one core.
    """
    cores = len(os.sched_getaffinity(0))

    def spin(_: int) -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)  # runs without the interpreter's lock

    def seconds(threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(spin, range(threads)))
            return time.perf_counter() - start

    return cores * statistics.median(seconds(1) / seconds(cores) for _ in range(5))


def records(
    common: Record, times: Mapping[str, Sequence[float]], bytes_moved: float
) -> Iterator[Record]:
    """One record per implementation of a case, from its seconds per call.

    `common` holds the fields that all records share, including "n". Implementations named "copy"
    move the same number of bytes; the fastest of them gives the machine's bandwidth.
    """
    n = int(str(common["n"]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy = min((s for name, s in medians.items() if name.startswith("copy")), default=None)
    ours = medians.get("jax_bce")
    for name, values in times.items():
        yield common | {
            "implementation": name,
            "rounds": len(values),
            "median_ns_per_element": medians[name] / n * 1e9,
            "min_ns_per_element": min(values) / n * 1e9,
            "gigabytes_per_second": bytes_moved / medians[name] / 1e9,
            "share_of_copy_bandwidth": copy and copy / medians[name],
            "times_jax_bce": ours and medians[name] / ours,
        }


def _cell(record: Record | None) -> str:
    if record is None or "median_ns_per_element" not in record:
        return "-"
    times = record["times_jax_bce"]
    shown = f"{record['median_ns_per_element']:.3g}"
    return (
        shown
        if times is None or record["implementation"] == "jax_bce"
        else f"{shown} ({times:.2g}x)"
    )


def table_of(title: str, results: Iterable[Record]) -> Table:
    """Nanoseconds per element of one case: a row for each n, a column for each implementation."""
    rows: dict[int, dict[str, Record]] = {}
    for result in results:
        rows.setdefault(int(str(result["n"])), {})[str(result["implementation"])] = result
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title=f"{title}: ns per element (ratio to jax_bce)")
    for column in ("n", *names, "jax_bce: GB/s, share of copy"):
        table.add_column(column, justify="right")
    for n, row in sorted(rows.items()):
        ours = row.get("jax_bce", {})
        share = "-"
        if ours.get("share_of_copy_bandwidth"):
            share = f"{ours['gigabytes_per_second']:.3g}, {ours['share_of_copy_bandwidth']:.0%}"
        table.add_row(f"2^{n.bit_length() - 1}", *(_cell(row.get(name)) for name in names), share)
    return table
