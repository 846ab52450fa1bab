"""Where the CPU kernel gets no more memory, a call ends in JAX's error, or the right value.

No helper is left behind with a frame that is gone, and no exception leaves a handler.
"""

import json
import subprocess
import sys
from pathlib import Path

import platforms
import pytest

SOURCES = Path(__file__).parent / "out_of_memory"
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]
HEADERS = SOURCES.parent.parent / "csrc"


@pytest.mark.any_jax
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.thorough
def test_parallel_for(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "parallel_for"
    flags = [*FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{HEADERS}"]
    subprocess.run(["g++", *flags, SOURCES / "parallel_for.cc", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    failed, wrong = (int(word) for word in done.stdout.split() if word.isdigit())
    assert failed > 6
    assert wrong == 0


CALLS = """
import ctypes, json, sys
import jax, numpy as np
import jax_bce

allocator = ctypes.CDLL(sys.argv[1])
allocator.has_failed.restype = ctypes.c_bool
logits = np.linspace(-30, 30, 3 * 70_000, dtype=np.float32).reshape(3, -1)
weight = np.linspace(1, 2, 70_000, dtype=np.float32)
call = jax.jit(lambda x: jax_bce.loss_and_grad(x, 1, weight=weight, axis=-1, implementation="cpu"))
operands = jax.device_put(logits)
expected = jax.block_until_ready(call(operands))

outcomes = []
for k in range(100):
    allocator.fail_from(ctypes.c_int64(k))
    try:
        results = jax.block_until_ready(call(operands))
        same = all(np.array_equal(a, b) for a, b in zip(results, expected))
        outcome = "right" if same else "wrong"
    except (RuntimeError, ValueError) as error:
        outcome = str(error)
    failed = allocator.has_failed()
    allocator.fail_from(ctypes.c_int64(2**63 - 1))
    if not failed:
        break
    outcomes.append(outcome)
    after = call(operands)
    assert all(np.array_equal(a, b) for a, b in zip(after, expected))
print(json.dumps(outcomes))
"""


def test_handler(cpu: str, tmp_path: Path) -> None:
    """What its checks and sums need is missed with an error; a helper is not."""
    allocator = tmp_path / "allocator.so"
    flags = [*FLAGS, "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, SOURCES / "allocator.cc", "-o", allocator], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALLS, str(allocator)],
        env=platforms.environment("cpu") | {"LD_PRELOAD": str(allocator), "NPROC": "4"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    errors = [outcome for outcome in outcomes if outcome != "right"]
    assert len(errors) >= 4
    assert all("RESOURCE_EXHAUSTED: out of memory" in error for error in errors), errors
    assert outcomes.count("right") >= 1
