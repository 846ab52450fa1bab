"""Writes docs/verification.md from the records of `make verify-...`: no figure is typed by hand.

python tests/verification/report.py [FILE]
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mutation import Mutation, recorded, table

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "results.jsonl", HERE.parent.parent / "docs" / "verification.md"

Records = dict[str, dict]
MISSING = "not in the record yet"


def sums(kind: str) -> Callable[[Records], str]:
    """The largest of their errors."""

    def figure(records: Records) -> str:
        found = [r for step, r in records.items() if step.startswith(f"exactness, {kind}")]
        if not found:
            return MISSING
        worst = max(r["relative_error"] for r in found)
        return f"{len(found)} sums: {worst:.2g} at most, {2**-23:.2g} allowed"

    return figure


def below(step: str) -> Callable[[Records], str]:
    """That there is a table of these steps, unless the record has none."""
    return lambda records: (
        "a table below" if any(name.startswith(step) for name in records) else MISSING
    )


# What is promised, how it is shown, and the figures: of the newest record of each step, whose name
# stands before the first dot of a field.
PROMISES: dict[str, list[tuple[str, str, str | Callable[[Records], str]]]] = {
    "exactness": [
        (
            "Sums of millions of losses, or of weighted ones, are as near as the contract says",
            "all alike, one huge, alternating, growing, falling; against math.fsum, relative",
            sums("sum of"),
        ),
        (
            "Sums of 2^31 elements, too",
            "a direct call whose weights are products of rows and columns, in such orders",
            sums("2^31 elements"),
        ),
        (
            "No input is worse than the contract",
            "a hill climb on the error, with mpmath where the result is float64",
            below("exactness, worst case"),
        ),
        (
            "Nor is any logit, with any instruction set",
            "tests/exhaustive.py",
            below("exactness, every logit"),
        ),
    ],
    "handlers": [
        (
            "A call that is wrong is refused, with the name of what is wrong",
            "hypothesis draws direct calls of the FFI targets and breaks each in one place: a "
            "rank, shape, dtype, attribute, modifier bit or number of operands",
            "{handlers.refused:,} calls in {handlers.kinds} ways, all refused by name; "
            "{handlers, right calls.accepted:,} right ones evaluated",
        ),
    ],
    "memory": [
        (
            "Nothing outside of its arrays is read or written, at any size and address",
            "the handlers without XLA; every array between two pages that fault, at either end; "
            "operands read-only; the results compared with the definition in long double",
            "{memory, plain.calls:,} calls with every size from 0 to 24,576, "
            "{memory, plain.compared:,} of them compared",
        ),
        (
            "The same under AddressSanitizer and UndefinedBehaviorSanitizer",
            "the same program, of every third size",
            "{memory, address.calls:,} calls",
        ),
        (
            "The same of the handlers and kernels for CUDA",
            "their source, compiled for the host, under both sanitizers",
            "{memory, CUDA.calls:,} calls, {memory, CUDA.compared:,} of them compared",
        ),
        (
            "No data races",
            "ThreadSanitizer: 8 callers that share pools of 0, 1 and 4 threads",
            "{memory, thread.calls:,} calls",
        ),
        (
            "The instruction sets give the same bits",
            "the same program under sanitizers, with each",
            "{memory, instruction sets.calls:,} calls on {memory, instruction sets.sets}",
        ),
        (
            "Nothing is read that was not written before",
            "valgrind, with its check for leaks",
            "{memory, valgrind.calls:,} calls",
        ),
        (
            "No call that a fuzzer finds does any of this",
            "libFuzzer chooses sizes, dtypes, broadcasts, modifiers and attributes",
            "{memory, libFuzzer.calls:,} calls in {memory, libFuzzer.seconds} seconds of a "
            "processor, {memory, libFuzzer.edges:,} edges of the code",
        ),
        (
            "The same inside XLA",
            "the built module with a preloaded AddressSanitizer",
            "{memory, preloaded.tests} tests of values, dtypes, weights and errors",
        ),
    ],
    "life": [
        (
            "Threads of Python",
            "8 threads call, half of them compiling each call; the bits are those of one thread",
            "{life, threads.calls:,} calls in {life, threads.seconds} s",
        ),
        (
            "fork and spawn",
            "a child forked after the import; processes that are spawned",
            "{life, fork.children} child, {life, spawn.processes} processes: the parent's bits",
        ),
        (
            "The end of the interpreter",
            "calls by threads that it waits for, and by atexit",
            "{life, end.threads} threads: the right bits",
        ),
        (
            "The end of the interpreter, no worse than with jnp",
            "daemon threads call while it ends, where JAX may abort; the same with jnp alone",
            "of {life, shutdown.runs} runs {life, shutdown.failed} aborted, with jnp "
            "{life, shutdown.failed_with_jnp}",
        ),
        (
            "KeyboardInterrupt",
            "raised by a timer at any moment of a call",
            "{life, interrupts.interrupted:,} interrupts, each next call right",
        ),
        (
            "Memory that runs out",
            "a limit of the address space (RLIMIT_AS) that the handler's sums exceed",
            "{life, address space.refused} call: JAX's error, and the process goes on; "
            "`tests/test_out_of_memory.py` lets every allocation of a call fail",
        ),
        (
            "No leak",
            "resident memory before and after, jitted, eager and wrong calls",
            "{life, memory.calls:,} calls: {life, memory.grown_bytes:,} bytes more",
        ),
        (
            "The caller's floating-point mode",
            "read before and after, also with subnormal numbers as zeros, also after errors",
            "{life, floating-point mode.calls} calls, and each of those of `verify-memory`",
        ),
    ],
    "digest": [
        (
            "One result everywhere",
            "digests of losses and gradients of fixed inputs, stored in the repository: on 1 to 7 "
            "threads, with each instruction set, on each Python and JAX of CI",
            "{digest, cpu.equal} digests, all equal",
        ),
        (
            "Also of the CUDA kernel's source",
            "compiled for the host, in the place of the CPU kernel in XLA",
            "{digest, CUDA on the host.equal} digests of float32 and float64, all equal",
        ),
    ],
    "supply": [
        (
            "The same bytes from the same sources",
            "two builds at two places, and one of the source distribution",
            "{supply, same bytes.builds} builds and that of the source distribution: one SHA-256",
        ),
        (
            "What is in a wheel",
            "its list of files, its licenses, and a bill of materials (CycloneDX)",
            "{supply, contents.files} files, compiled in: {supply, contents.compiled_in}; "
            "auditwheel: {supply, contents.tag}",
        ),
        (
            "Hardening costs nothing",
            "the time of a call with the flags, divided by that without, for each size",
            "{supply, hardening.time_with_per_time_without}",
        ),
    ],
}


def newest(file: Path) -> Records:
    lines = file.read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if line["step"] != "mutation"}


def shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {number:.2f}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def filled(text: str | Callable[[Records], str], records: Records) -> str:
    """The text with the figures in the place of its fields, or that they are not there yet."""
    if callable(text):
        return text(records)
    parts = text.split("{")
    if any(part.rpartition("}")[0].rpartition(".")[0] not in records for part in parts[1:]):
        return MISSING
    for place, part in enumerate(parts[1:], 1):
        inside, _, after = part.partition("}")
        name, _, style = inside.partition(":")
        step, _, figure = name.rpartition(".")
        value = records[step][figure]
        parts[place] = (format(value, style) if style else shown(value)) + after
    return "".join(parts)


def rows(cells: Iterable[Iterable[str]]) -> Iterator[str]:
    for row in cells:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


def headed(*columns: str) -> list[str]:
    return ["", "| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]


def worst_cases(records: Records) -> Iterator[str]:
    found = [r for step, r in records.items() if step.startswith("exactness, worst case")]
    if not found:
        return
    yield from headed("dtype", "searched", "result", "inputs", "largest ulp", "allowed", "at")
    yield from rows(
        (
            r["dtype"],
            r["kind"],
            r["result"],
            f"{r['inputs']:,}",
            f"{r['ulp']:.3f}",
            f"{r['allowed']:g}",
            ", ".join(f"{name} {value:.9g}" for name, value in r["at"].items()),
        )
        for r in found
    )


def every_logit(records: Records) -> Iterator[str]:
    found = [r for step, r in records.items() if step.startswith("exactness, every logit")]
    if not found:
        return
    yield from headed(
        *("instruction set", "loss", "dtype", "labels", "result", "logits"),
        *("results", "largest ulp", "allowed"),
    )
    yield from rows(
        (
            r["instruction_set"],
            r["loss"],
            r["dtype"],
            r["labels"],
            r["result"],
            "every one" if r["stride"] == 1 else f"one of {r['stride']}",
            f"{r['results']:,}",
            f"{r['ulp']:.4f}",
            f"{r['allowed']:g}",
        )
        for r in found
    )


def caught_by(mutation: Mutation, known: dict[str, dict]) -> str:
    line = known.get(mutation.key)
    if line is None:
        return "not tried"
    if not line["caught"]:
        return f"**nothing** ({mutation.defended})" if mutation.defended else "**nothing**"
    if line["by"] in ("does not end", "first"):
        how = "does not end" if line["by"] == "does not end" else "crashes"
        return f"`{mutation.tests[0].removeprefix('tests/')}`, which {how}"
    return f"`{line['by'].removeprefix('tests/')}`"


def page(file: Path) -> str:
    records, known = newest(file), recorded(file)
    lines = [
        "# Verification",
        "",
        "What is promised beside accuracy and speed, how it is shown, and what the last full run "
        "found. `make verify-...` runs a line in full and adds to the record; the tests run a "
        "short form of each. `make verification` writes this page from the record. Accuracy is in "
        "[accuracy.md](accuracy.md), sharding and transformations in "
        "[transforms.md](transforms.md).",
    ]
    for target, promises in PROMISES.items():
        own = [record for step, record in records.items() if step.partition(",")[0] == target]
        last = max(own, key=lambda record: record["date"])
        days = sorted({record["date"][:10] for record in own})
        dates = " to ".join(dict.fromkeys((days[0], days[-1])))
        lines += ["", f"## `make verify-{target}`", ""]
        lines += [f"{dates}, {last['device']}, Python {last['python']}, JAX {last['jax']}"]
        lines += headed("promise", "how it is shown", "figure")
        lines += rows((p, how, filled(figure, records)) for p, how, figure in promises)
        if target == "exactness":
            lines += [*worst_cases(records), *every_logit(records)]

    tried = [mutation for mutation in table() if mutation.key in known]
    caught = [mutation for mutation in tried if known[mutation.key]["caught"]]
    only = [mutation for mutation in caught if known[mutation.key]["stage"] == "exhaustive"]
    lines += [
        "",
        "## `make verify-mutation`",
        "",
        f"{len(table())} deliberate breaks of the sources, one at a time; {len(tried)} were tried, "
        f"and the tests caught {len(caught)}, of which {len(only)} only in the exhaustive run. The "
        "test is the first that failed.",
        *headed("break", "in", "caught by"),
    ]
    lines += rows((m.what, f"`{m.file}`", caught_by(m, known)) for m in table())
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS))


if __name__ == "__main__":
    main()
