"""Breaks the sources in the ways of mutations.toml, one at a time, and looks which test notices.

    python tests/verification/mutation.py --record FILE [--only WORDS] [--jobs 2] [--stages 4]

Each break is applied to a copy of the tree and rebuilt, the CPU kernel for one instruction set and
with -O1. Then come, until one fails: the tests that are most likely to (`tests` in the table), a
sample of all tests, all of them, and the exhaustive run. What has a line in the record is not run
again. Needs pybind11, and an installed jax_bce.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent.parent
TABLE = Path(__file__).parent / "mutations.toml"
STAGES = ("first", "sample", "all", "exhaustive")
SET = "aarch64" if platform.machine() == "aarch64" else "x86-64-v3"
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
MARCH = [] if SET == "aarch64" else ["-march=x86-64-v3"]
# Those that compile the sources by themselves, and need no rebuilt module.
COMPILING = ("test_memory.py", "test_cuda.py", "test_out_of_memory.py::test_parallel_for")
# What a broken tree, or a module that is built here, fails anyway: the table no longer fits, the
# module is not a wheel's, and its headers are the running jaxlib's.
LEFT_OUT = (
    "tests/verification/test_mutation.py",
    "tests/verification/test_supply.py",
    "tests/test_package.py::test_headers_come_from_the_oldest_supported_jaxlib",
)


@dataclass(frozen=True)
class Mutation:
    """A line of the table."""

    what: str
    file: str
    before: str
    after: str
    tests: Sequence[str]
    defended: str = ""

    @property
    def key(self) -> str:
        text = "\0".join((self.file, self.before, self.after))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_python(self) -> bool:
        return self.file.endswith(".py")

    def applied(self, text: str) -> str:
        if text.count(self.before) != 1:
            raise ValueError(f"{self.what}: {self.before!r} is not once in {self.file}")
        return text.replace(self.before, self.after)


def table() -> list[Mutation]:
    return [Mutation(**line) for line in tomllib.loads(TABLE.read_text())["mutation"]]


class Tree:
    """A copy of the tracked files, with built modules."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects = folder, folder / "objects"
        self.module = folder / "src/jax_bce" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.objects.mkdir()
        import jax_bce

        for module in Path(jax_bce.__file__).parent.glob("_cuda.*.so"):
            shutil.copy(module, folder / "src/jax_bce")
        self.build(self.sources())
        self.sound = set[str]()  # tests that pass without a break
        self.kept = folder / "kept"
        shutil.copytree(self.objects, self.kept)

    def restore(self) -> None:
        """The module as it was before a break."""
        shutil.copytree(self.kept, self.objects, dirs_exist_ok=True)
        shutil.copy(self.kept / self.module.name, self.module)

    def sources(self) -> list[str]:
        return ["bce_cpu_float32.cc", "bce_cpu_float64.cc", "ffi_cpu.cc"]

    def build(self, sources: Sequence[str]) -> bool:
        """Compiles these and links the module. Returns whether that went well."""
        import jax
        import pybind11

        # The other instruction set is this one.
        other = self.objects / "other.cc"
        other.write_text(
            '#include "bce_cpu.h"\n'
            "namespace jax_bce::avx512 {\n"
            "const CpuLoop kFloat32 = baseline::kFloat32, kFloat64 = baseline::kFloat64;\n"
            "}\n"
        )
        python = sysconfig.get_path("include")
        folders = [f"-isystem{f}" for f in (python, pybind11.get_include(), jax.ffi.include_dir())]
        compiler = ["g++", *FLAGS, *folders, f"-I{self.folder / 'csrc'}"]
        jobs = []
        for source in (*sources, "other.cc"):
            path = other if source == "other.cc" else self.folder / "csrc" / source
            kind = MARCH if source.startswith("bce_cpu") else []
            command = [*compiler, *kind, "-DBCE_INSTRUCTION_SET=baseline", "-c", str(path)]
            jobs.append(subprocess.Popen([*command, "-o", str(self.objects / f"{path.stem}.o")]))
        statuses = [job.wait() for job in jobs]
        linked = self.objects / self.module.name
        link = ["g++", "-shared", *map(str, self.objects.glob("*.o")), "-o", str(linked)]
        if any(statuses) or subprocess.run(link).returncode:
            return False
        shutil.copy(linked, self.module)
        return True

    def run(self, command: Sequence[str], limit: float) -> tuple[int | None, str]:
        """The exit status, None if it took too long, and the output."""
        environment = os.environ | {
            "PYTHONPATH": str(self.folder / "src"),
            "JAX_BCE_CPU": SET,
            "JAX_BCE_REQUIRE": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "500",  # of the summary's lines, which hold a test's name
            # Which a broken kernel does not invalidate: it is not part of a program.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return None, ""
        return process.returncode, output

    def stage(self, name: str, mutation: Mutation) -> tuple[bool, str]:
        """Whether the break is noticed, and by what."""
        ignored = [f"--deselect={test}" for test in LEFT_OUT]
        pytest = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *ignored]
        command = {
            "first": [*pytest, *mutation.tests],
            "sample": [*pytest, "-n", "2"],
            "all": [*pytest, "-n", "2", "--all"],
            "exhaustive": ["tests/exhaustive.py"],
        }[name]
        status, output = self.run(command, limit={"first": 900}.get(name, 7200))
        if status is None:
            return True, "does not end"
        if status == 0:
            return False, ""
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.M)
        if failed is None and "ImportError while loading conftest" in output:
            return True, "tests/conftest.py, which cannot be imported"
        if failed is None and name != "exhaustive" and status not in (-6, -11):
            raise RuntimeError(f"{mutation.what}: pytest ended with {status}:\n{output[-3000:]}")
        return True, failed[1] if failed else name

    def check(self, test: str, everything: bool) -> None:
        """What fails without a break would notice every one."""
        if test not in self.sound and "::" in test:
            options = ["-q", "-p", "no:cacheprovider", *(["--all"] if everything else [])]
            status, output = self.run(["-m", "pytest", *options, test], limit=900)
            if status != 0:
                raise RuntimeError(f"{test} fails without a break:\n{output[-3000:]}")
            self.sound.add(test)

    def try_one(self, mutation: Mutation, stages: Sequence[str]) -> dict[str, object]:
        began = time.monotonic()
        path = self.folder / mutation.file
        text = path.read_text()
        built = mutation.is_python() or mutation.file.endswith((".cu", ".cuh"))
        handlers = mutation.file in ("csrc/ffi_common.h", "csrc/ffi_cpu.cc", "csrc/parallel_for.h")
        loops = mutation.file in ("csrc/bce_math.h", "csrc/bce_focal.h", "csrc/bce_cpu_loop.h")
        kernels, handler = self.sources()[:-1], self.sources()[-1:]
        affected = handler if handlers else kernels if loops else [*kernels, *handler]
        rebuilt = False
        found: dict[str, object] = {"caught": False}
        try:
            path.write_text(mutation.applied(text))
            for stage in stages:
                own = stage == "first" and all(
                    any(name in test for name in COMPILING) for test in mutation.tests
                )
                if not built and not own and not rebuilt:
                    rebuilt = True
                    if not self.build(affected):
                        found = {"caught": True, "stage": "compiler", "by": "g++"}
                        break
                noticed, by = self.stage(stage, mutation)
                if noticed:
                    found = {"caught": True, "stage": stage, "by": by}
                    break
        finally:
            path.write_text(text)
            if rebuilt:
                self.restore()
        if found["caught"]:
            everything = found["stage"] == "all" or "--all" in mutation.tests
            self.check(str(found["by"]), everything)
        return found | {"seconds": round(time.monotonic() - began)}


def recorded(file: Path) -> dict[str, dict]:
    """The lines of the record by the key of their mutation."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    return {line["key"]: line for line in found if line["step"] == "mutation"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--only", default="", help="of the table's lines, those with these words")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stages", type=int, default=len(STAGES), choices=range(1, 5))
    parser.add_argument("--again", action="store_true", help="also what survived fewer stages")
    arguments = parser.parse_args()
    stages = STAGES[: arguments.stages]
    known = recorded(arguments.record)
    chosen = [
        mutation
        for mutation in table()
        if arguments.only in f"{mutation.what} {mutation.file}"
        and not (mutation.key in known and (known[mutation.key]["caught"] or not arguments.again))
    ]
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Tree] = Queue()
        for number in range(arguments.jobs):
            trees.put(Tree(Path(folder) / f"{number}"))

        def work(mutation: Mutation) -> None:
            tree = trees.get()
            try:
                found = tree.try_one(mutation, stages)
            finally:
                trees.put(tree)
            line = {
                "step": "mutation",
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "jax": version("jax"),
                "key": mutation.key,
                "what": mutation.what,
                "file": mutation.file,
                "stages": len(stages),
            }
            with arguments.record.open("a") as stream:
                stream.write(json.dumps(line | found) + "\n")
            print(mutation.what, "|", found, flush=True)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(work, chosen))
    known = recorded(arguments.record)
    survivors = [
        m.what
        for m in table()
        if not known.get(m.key, {"caught": False})["caught"] and not m.defended
    ]
    print(f"{len(table())} breaks, {len(survivors)} survive or were not tried: {survivors}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
