"""Shows the newest record of `make bench` as the README's chart and as tables.

    python examples/speed.py                          # prints the tables and saves a chart
    python examples/speed.py --pages README.md docs/benchmarks.md  # also updates these pages

This script measures nothing. `make bench` writes benchmarks/results/cpu-DATE.jsonl, with one line
for each function, size and implementation; the script shows the medians. benchmarks/linear.py
writes cpu-linear-DATE.jsonl, and benchmarks/options.py what its --output says.
"""

import argparse
import json
import re
import textwrap
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from picture import WIDTH, Colors, add_options, plt, save

ROOT = Path(__file__).parent.parent
NAMES = {
    "jax_bce": "jax_bce",
    "optax": "optax",
    "jnp": "plain jnp",
    "torch": "PyTorch",
    "torch, compiled": "compiled PyTorch",
}
FLOAT32 = "float32, float32 labels"
LINES = {
    "jax_bce": {"marker": "o", "linewidth": 3},
    "optax": {"marker": "s", "linestyle": (0, (4, 2))},
    "plain jnp": {"marker": "^", "linestyle": (0, (1, 1))},
    "PyTorch": {"marker": "D", "linestyle": (0, (5, 1, 1, 1))},
}
COPY = "copy of the same bytes"
CALLS = (
    ("the mean loss, eager", "loss", "eager"),
    ("with weights and a mask, eager", "loss, weight, where", "eager"),
    ("focal loss, eager", "focal_loss", "eager"),
    ("asymmetric loss, eager, and optax's mean loss", "asymmetric_loss", "eager"),
    ("the loss from probabilities, eager, and optax's mean loss", "loss_from_probs", "eager"),
    ("loss and gradient, eager: `jax.value_and_grad`", "value_and_grad(loss)", "eager"),
    ("loss and gradient, eager: `loss_and_grad`", "loss_and_grad", "eager"),
    ("the mean loss, in `jax.jit`", "loss", "jitted"),
    ("loss and gradient, in `jax.jit`", "value_and_grad(loss)", "jitted"),
    ("compiling loss and gradient", "value_and_grad(loss)", "compile"),
    ("the import, after jax", "import", "import"),
)
# The cases of benchmarks/options.py, in the words of the page.
OPTIONS = {
    "unweighted": "without options",
    "into a donated buffer": "without options, the gradient in a donated buffer",
    "pos_weight (C,)": "`pos_weight` (C,)",
    "row mask": "`where` (B,)",
    "pos_weight (C,), row mask": "`pos_weight` (C,), `where` (B,)",
    "label_smoothing": "`label_smoothing`",
    "sample_weight (B,)": "`sample_weight` (B,)",
    "weight (C,), sample_weight (B,)": "`weight` (C,), `sample_weight` (B,)",
    "mask (B, C)": "`where` (B, C)",
    "ignore_label": "`ignore_label`",
    "optax: pos_weight (C,), row mask": "optax, with `pos_weight` (C,) and a row mask by hand",
    "focal_loss": "`focal_loss`",
    "focal_loss, gamma 1.5": "`focal_loss`, gamma 1.5",
    "asymmetric_loss": "`asymmetric_loss`",
    "optax: sigmoid_focal_loss": "optax's `sigmoid_focal_loss`",
    "PyTorch: torchvision's focal loss": "torchvision's focal loss in PyTorch, eager",
    "PyTorch: timm's asymmetric loss": "timm's asymmetric loss in PyTorch, eager",
    "grad_and_hess": "`grad_and_hess`, with XGBoost's floor",
    "plain jnp": "the same in plain jnp",
    "loss_and_grad, not reduced": '`loss_and_grad`, `reduction="none"`',
}
# The text of a page between `<!-- speed.py: NAME -->` and `<!-- end -->`.
MARKED = re.compile(r"(<!-- speed\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Nanoseconds per element, by number of elements and implementation.
Times = dict[int, dict[str, float]]


def newest_record() -> list[dict]:
    """The lines of the file whose name has the latest date."""
    path = max((ROOT / "benchmarks" / "results").glob("cpu-[0-9]*.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def times(
    record: list[dict], case: str, memory: str, dtype: str = FLOAT32, one_core: bool = False
) -> Times:
    found: Times = {}
    cores = 1 if one_core else max(line["cores"] for line in record)
    wanted = {"case": case, "memory": memory, "dtype": dtype, "cores": cores}
    for line in record:
        if not wanted.items() <= line.items():
            continue
        row = found.setdefault(line["n"], {})
        name, nanoseconds = line["implementation"], line["median_ns_per_element"]
        if name in NAMES:
            row[NAMES[name]] = nanoseconds
        elif name.startswith("copy"):  # the best number of threads
            row[COPY] = min(nanoseconds, row.get(COPY, nanoseconds))
    return dict(sorted(found.items()))


def calls() -> list[str]:
    """A Markdown table of the newest `cpu-calls-DATE.jsonl`: overhead, compilation, import."""
    path = max((ROOT / "benchmarks" / "results").glob("cpu-calls-*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(line["call"], line["case"], line["implementation"]): line for line in lines}
    rows = ["| | jax_bce | optax |", "| --- | ---: | ---: |"]
    for text, call, case in CALLS:
        ours, peer = (found[call, case, name]["median_us"] for name in ("jax_bce", "optax"))
        unit, size = ("µs", 1) if peer < 1e4 else ("ms", 1e3)
        shown = [f"{t / size:,.0f}" if t / size >= 100 else f"{t / size:.1f}" for t in (ours, peer)]
        cells = (f"{shown[0]} {unit}", f"{shown[1]} {unit} ({peer / ours:.1f}x)")
        rows.append(f"| {text} | {' | '.join(cells)} |")
    return rows


def options() -> list[str]:
    """A Markdown table of the newest `cpu-options-DATE.jsonl`: milliseconds, and ratios."""
    path = max((ROOT / "benchmarks" / "results").glob("cpu-options-*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["case"]: line for line in lines if line["shape"] == lines[0]["shape"]}
    rows = ["| | ms | ratio |", "| --- | ---: | ---: |"]
    for case, words in OPTIONS.items():
        if case in found:  # PyTorch may have been left out
            time, ratio = found[case]["median_ms"], found[case]["ratio"]
            shown = f"{time:.1f}" if time < 100 else f"{time:,.0f}"
            rows.append(f"| {words} | {shown} | {ratio:.2f} |")
    return rows


def linear() -> list[str]:
    """A Markdown table of the newest `cpu-linear-DATE.jsonl`: time and memory by labels."""
    path = max((ROOT / "benchmarks" / "results").glob("cpu-linear-*.jsonl"))
    rows: dict[int, dict[str, dict]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        rows.setdefault(line["labels"], {})[line["implementation"]] = line
    names = list(next(iter(rows.values())))
    lines = [f"| labels | {' | '.join(names)} |", "| ---: |" + " ---: |" * len(names)]
    for labels, row in rows.items():
        cells = []
        for name in names:
            seconds = row[name]["median_seconds"]
            shown = f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
            times = row[name]["times_linear_loss"]
            ratio = "" if name == "linear_loss" else f" ({times:.1f}x)"
            cells.append(f"{shown}{ratio}, {row[name]['mib_beyond_inputs']:,.0f} MiB")
        lines.append(f"| {labels:,} | {' | '.join(cells)} |")
    return lines


def where(record: list[dict]) -> str:
    line = record[0]
    versions = ", ".join(
        f"{name} {line['versions'][package].partition('+')[0]}"
        for package, name in (("jax", "jax"), ("optax", "optax"), ("torch", "PyTorch"))
    )
    kernel = line["kernel"].removeprefix("loaded, ")
    machine = f"{line['cores']} cores of an {line['processor']} ({kernel})"
    if capacity := line.get("parallel_capacity"):
        machine += f", which do {capacity:.2f} times the work of one"
    return f"Measured on {line['date'][:10]} on {machine}, with {versions}."


def draw(record: list[dict], colors: Colors) -> Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, 3.9))
    rows = times(record, "value_and_grad, mean", "fresh")
    for name, line in LINES.items():
        points = {n: row[name] for n, row in rows.items() if name in row}
        style = {"color": colors[name], "label": name, "markersize": 5, "linewidth": 1.8}
        axis.plot(points.keys(), points.values(), **(style | line))
    axis.set_xscale("log", base=2)
    axis.set(
        yscale="log", xlabel="elements in the batch, float32", ylabel="nanoseconds per element"
    )
    ticks = [1, 3, 10, 30, 100, 300]
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set_title("Loss and gradient on a CPU: lower is better")
    axis.legend(loc="upper right", ncols=2)
    return figure


def _power(n: int) -> str:
    return "2" + str(n.bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def table(rows: Times, names: list[str], microseconds: bool = False) -> list[str]:
    """A Markdown table: nanoseconds per element or microseconds per call, and ratios to jax_bce."""
    lines = [f"| n | {' | '.join(names)} |", "| ---: |" + " ---: |" * len(names)]
    for n, row in rows.items():
        cells = []
        for name in names:
            if name not in row:
                cells.append("-")
                continue
            time = row[name] * (n / 1e3 if microseconds else 1)
            shown = f"{time:.3g}" if time < 1000 else f"{time:,.0f}"
            peer = name not in ("jax_bce", COPY)
            cells.append(f"{shown} ({row[name] / row['jax_bce']:.1f}x)" if peer else shown)
        lines.append(f"| {_power(n)} | {' | '.join(cells)} |")
    return lines


def best_others(record: list[dict], one_core: bool) -> list[str]:
    """A Markdown table of all dtypes: our nanoseconds, and how many times the best other takes."""
    rows: dict[str, Times] = {}
    for line in record:
        if line["dtype"] not in rows:
            case = "value_and_grad, mean"
            rows[line["dtype"]] = times(record, case, "fresh", line["dtype"], one_core)
    sizes = sorted(set.intersection(*map(set, rows.values())))
    lines = [f"| logits, labels | {' | '.join(map(_power, sizes))} |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for dtype, row in rows.items():
        cells = []
        for n in sizes:
            own = row[n]["jax_bce"]
            best = min(
                row[n][name] for name in NAMES.values() if name in row[n].keys() - {"jax_bce"}
            )
            cells.append(f"{own:.3g} ({best / own:.1f}x)")
        lines.append(f"| {dtype.removesuffix(' labels')} | {' | '.join(cells)} |")
    return lines


def ratios(rows: Times) -> str:
    """A sentence that says how many times as long as jax_bce each peer takes."""
    found = []
    for name in NAMES.values():
        times = [row[name] / row["jax_bce"] for row in rows.values() if name in row]
        if times and name != "jax_bce":
            found.append(f"{name} {min(times):.1f} to {max(times):.1f} times")
    *most, last = found
    sizes = f"{_power(min(rows))} to {_power(max(rows))} elements"
    peers = f"{', '.join(most)} and {last}"
    return f"Computing loss and gradient for {sizes} takes {peers} as long as jax_bce."


def texts(record: list[dict]) -> dict[str, str]:
    """The texts and tables for the pages, by name."""
    peers = list(NAMES.values())
    both, value = "value_and_grad, mean", "value, mean"
    fresh = times(record, both, "fresh")
    small = {n: row for n, row in fresh.items() if n <= 2**16}
    tables = {
        "both": table(fresh, [*peers, COPY]),
        "small": table(small, peers, microseconds=True),
        "value": table(times(record, value, "fresh"), [*peers, COPY]),
        "one_core": table(times(record, both, "fresh", one_core=True), [*peers, COPY]),
        "dtypes": best_others(record, one_core=False),
        "dtypes_on_one_core": best_others(record, one_core=True),
        "warm": table(times(record, both, "warm"), [*peers, COPY]),
        "calls": calls(),
        "options": options(),
        "linear": linear(),
    }
    words = {"where": textwrap.fill(where(record), 98), "ratios": textwrap.fill(ratios(fresh), 98)}
    return words | {name: "\n".join(lines) for name, lines in tables.items()}


def update(page: Path, found: dict[str, str]) -> None:
    """Replaces each marked text of the page."""
    page.write_text(
        MARKED.sub(lambda match: f"{match[1]}{found[match[2]]}\n{match[3]}", page.read_text())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the newest record of make bench.")
    add_options(parser, "speed.png")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages to update")
    options = parser.parse_args()

    record = newest_record()
    found = texts(record)
    for name, text in found.items():
        print(f"{name}:\n\n{text}\n")
    for page in options.pages:
        update(page, found)
    save(partial(draw, record), options.plot, options.dark)
    print(f"Plot: {options.plot}")


if __name__ == "__main__":
    main()
