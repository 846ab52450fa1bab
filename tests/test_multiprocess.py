"""Training in several processes ends with the weights of one; where one dies, the others end, too.

They run `examples/train_multiprocess.py`: started by itself on this machine, and one by one, as on
several hosts.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer

import numpy as np
import oracle
import platforms
import pytest
from oracle import FLOAT32

pytestmark = pytest.mark.any_jax

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_multiprocess.py"
STEPS = 20
# Seconds that no run comes near: they turn a hang into a failure.
HANGS, OUTLIVES = 300, 60


@contextmanager
def started(folder: Path, *arguments: Sequence[str]) -> Iterator[list[subprocess.Popen]]:
    """One process for each list of arguments; in the end all are killed, with what they started."""
    # In place of the flag that forces devices: those that leave the compiled step as text.
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
    environment = platforms.environment("cpu") | {"XLA_FLAGS": flags, "PYTHONWARNINGS": "error"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, EXAMPLE, *given],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            for given in arguments
        ]

        def kill() -> None:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

        limit = Timer(HANGS, kill)
        limit.start()
        try:
            yield processes
        finally:
            limit.cancel()
            kill()


def trained(folder: Path, processes: int) -> dict[str, np.ndarray]:
    """The weights and the losses, after a look at what was run."""
    folder.mkdir()
    arguments = ["--processes", f"{processes}", "--steps", f"{STEPS}", "--save", "trained.npz"]
    with started(folder, arguments) as [process]:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = re.search(r"processes (\d+), devices (\d+), accuracy on unseen digits (.+)", output)
    assert found.group(1, 2) == (f"{processes}", f"{processes}")
    assert float(found[3]) > 0.75
    programs = list(folder.glob("*jit_step.*after_optimizations.txt"))
    assert programs
    for program in programs:
        text = program.read_text()
        assert 'custom_call_target="jax_bce_v3_loss_and_grad"' in text
        assert "all-gather" not in text
    with np.load(folder / "trained.npz") as file:
        return dict(file)


@pytest.mark.thorough
def test_trains_as_one_process_does(cpu: str, tmp_path: Path, check) -> None:
    """In each step, each run rounds a weight once: to a fraction of an ulp of the largest."""
    expected = trained(tmp_path / "1", 1)
    actual = trained(tmp_path / "4", 4)
    assert set(actual) == set(expected) == {"hidden", "output", "losses"}
    for name, values in actual.items():
        assert values.dtype == FLOAT32
        check.ulps(
            f"{name} of 4 processes against 1",
            values,
            expected[name],
            bound=2 * STEPS * oracle.ROUNDED,
            scale=abs(expected[name]).max(),
        )


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "other"])
def test_ends_where_one_is_killed(cpu: str, tmp_path: Path, victim: int) -> None:
    """Its peers wait for its part of a sum, which never comes."""
    with socket.socket() as reserved:  # as in the example
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        address = f"localhost:{reserved.getsockname()[1]}"
        common = f"--coordinator {address} --processes 3 --heartbeat 10 --steps 100000 --process"
        arguments = [[*common.split(), f"{number}"] for number in range(3)]
        with started(tmp_path, *arguments) as processes:
            # Process 0 has the loss of a step when all have done their part of it.
            assert any(line.startswith("step 3 ") for line in processes[0].stdout)
            processes[victim].kill()
            for other in set(processes) - {processes[victim]}:
                _, errors = other.communicate(timeout=OUTLIVES)
                assert other.returncode not in (0, -signal.SIGKILL)
                assert re.search("JaxRuntimeError|another task died", errors), errors
