"""A call ends in the right value or in an error, whatever else happens in the process.

Threads, forks, interrupts, the end of the interpreter, and memory that runs out. Nothing is left
behind: neither memory nor another floating-point mode.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import platforms
import pytest

pytestmark = [pytest.mark.any_jax, pytest.mark.thorough]

# The calls that are made, with the bits that they have alone.
COMMON = """
import json, os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import jax_bce

ours = jax_bce.loss_and_grad
rng = np.random.default_rng(0)
logits = rng.normal(0, 4, (3, 30_011)).astype(np.float32)
labels = rng.integers(0, 2, logits.shape).astype(np.uint8)
options = [
    {}, {"axis": -1}, {"reduction": "none"}, {"reduction": "sum", "pos_weight": np.float32(3)},
    {"reduction": "weighted_mean", "where": logits > -3, "weight": np.abs(logits)},
]

def call(i, jit):
    keywords = options[i % len(options)] | {"implementation": "cpu"}
    function = lambda x, y: ours(x, y, **keywords)
    return (jax.jit(function) if jit else function)(logits, labels)

def bits(results):
    return [np.asarray(result).tobytes() for result in results]
"""


def run(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The code, with what is above, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", COMMON + code, *map(str, arguments)],
        cwd="/",
        env=platforms.environment("cpu") | {"NPROC": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_threads(cpu: str, full: bool, record: Callable) -> None:
    """Eight of them, half of which compile what they call, again and again."""
    seconds = 60 if full else 3
    code = """
from concurrent.futures import ThreadPoolExecutor
seconds = float(sys.argv[1])
expected = [bits(call(i, True)) for i in range(len(options))]
end = time.monotonic() + seconds

def work(thread):
    calls = wrong = 0
    while time.monotonic() < end:
        wrong += bits(call(calls, thread % 2)) != expected[calls % len(options)]
        calls += 1
    return calls, wrong

with ThreadPoolExecutor(8) as pool:
    calls, wrong = map(sum, zip(*pool.map(work, range(8))))
print(json.dumps([calls, wrong]))
"""
    calls, wrong = json.loads(run(code, seconds).stdout)
    assert calls > 8
    assert wrong == 0
    record("life, threads", seconds=seconds, calls=calls)


def test_fork(cpu: str, record: Callable) -> None:
    """A child that is forked after the import, before JAX has started, works like its parent."""
    code = """
read, write = os.pipe()
child = os.fork()
results = b"".join(bits(call(0, True)) + bits(call(4, False)))
if child == 0:
    os.write(write, results[:1000])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert os.read(read, 1000) == results[:1000]
"""
    run(code)
    record("life, fork", children=1)


def test_spawn(cpu: str, record: Callable) -> None:
    """Processes that Python spawns; what they send back is what the parent computes."""
    code = """
import multiprocessing
from functools import partial
function = partial(ours, implementation="cpu")
expected = bits(function(logits[0], labels[0]))
with multiprocessing.get_context("spawn").Pool(2) as pool:
    for results in pool.starmap(function, [(logits[0], labels[0])] * 4):
        assert bits(results) == expected
"""
    run(code)
    record("life, spawn", processes=2)


SHUTDOWN = """
function = {"ours": jax_bce.loss, "jnp": lambda x, y: jnp.mean(jnp.logaddexp(0.0, x) - x * y)}
function = jax.jit(function[sys.argv[1]])
started = threading.Event()

def work():
    while True:
        function(logits, labels).block_until_ready()
        started.set()

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
started.wait()
"""


def test_calls_at_the_end(cpu: str, record: Callable) -> None:
    """When the main thread has ended: by threads that Python waits for, and by atexit."""
    code = """
import atexit
expected = bits(call(0, True))

def work():
    threading.main_thread().join()
    for i in range(20): assert bits(call(0, i % 2)) == expected
    print("thread\\n", end="")  # in one piece, whatever other threads print

def last():
    assert bits(call(0, False)) == expected
    print("atexit")

atexit.register(last)
for _ in range(4):
    threading.Thread(target=work).start()
"""
    assert run(code).stdout.split() == ["thread"] * 4 + ["atexit"]
    record("life, end", threads=4)


def test_daemons_at_the_end(cpu: str, full: bool, record: Callable) -> None:
    """No worse than with jnp alone: JAX itself aborts where Python ends a thread inside of it."""
    times = 20 if full else 2

    def failures(name: str) -> list[str]:
        done = [run(SHUTDOWN, name, check=False) for _ in range(times)]
        return [f"{d.returncode}: {d.stderr[-300:]}" for d in done if d.returncode]

    ours = failures("ours")
    plain = failures("jnp") if ours or full else []
    assert len(ours) <= len(plain), ours
    record("life, shutdown", runs=times, failed=len(ours), failed_with_jnp=len(plain))


def test_interrupts(cpu: str, full: bool, record: Callable) -> None:
    """KeyboardInterrupt at any moment of a call; the next call is right."""
    times = 1000 if full else 100
    code = """
times = int(sys.argv[1])
expected = [bits(call(i, jit)) for i in range(len(options)) for jit in (True, False)]
functions = [jax.jit(lambda x, y, i=i: ours(x, y, **options[i])) for i in range(len(options))]
for function in functions: function(logits, labels)
interrupted = 0
for time_ in range(times):
    i = time_ % len(options)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + 37 * time_ % 400))
        for _ in range(50): jax.block_until_ready(functions[i](logits, labels))
        for _ in range(50): ours(logits, labels, **options[i])
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert bits(functions[i](logits, labels)) == expected[2 * i]
print(interrupted)
"""
    interrupted = int(run(code, times).stdout)
    assert interrupted > times // 2
    record("life, interrupts", interrupted=interrupted)


def test_address_space_that_ends(cpu: str, record: Callable) -> None:
    """The handler's sums of blocks do not fit: JAX's error, and the process goes on.

    One row of logits for 16 million labels, so that nothing is as large as these sums.
    """
    code = """
import resource
rows, columns = 16_000_000, 4 * 8192
operands = (np.zeros((1, columns), np.float32), np.zeros((rows, 1), np.uint8),
            np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
attributes = {"modifiers": np.int64(0), "reduced_rank": np.int64(1), "count": np.int64(columns)}
target = jax.ffi.ffi_call("jax_bce_v3_loss", [jax.ShapeDtypeStruct((rows,), np.float32)])
large = jax.jit(lambda *operands: target(*operands, **attributes)).lower(*operands).compile()
operands = jax.device_put(operands)
expected = bits(call(0, True))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000, limits[1]))
try:
    jax.block_until_ready(large(*operands))
except Exception as error:
    message = str(error)
inside = bits(call(0, True)) == expected
resource.setrlimit(resource.RLIMIT_AS, limits)
assert inside and bits(call(0, True)) == expected
print(message)
"""
    assert "RESOURCE_EXHAUSTED: out of memory" in run(code).stdout
    record("life, address space", refused=1)


def test_memory_stays(cpu: str, full: bool, record: Callable) -> None:
    """The resident memory after thousands of calls, some of which are errors."""
    calls = 10_000 if full else 2_000
    code = """
calls = int(sys.argv[1])
x, y = jax.device_put((logits, labels))
jitted = jax.jit(lambda x, y: ours(x, y, axis=-1))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def repeat(times):
    for i in range(times):
        jax.block_until_ready((jitted(x, y), ours(x, y, pos_weight=2.0)))
        if i % 10 == 0:
            try: ours(x, y[0])
            except ValueError: pass

repeat(1000)
before = resident()
repeat(calls // 2)
print(resident() - before)
"""
    grown = int(run(code, calls).stdout)
    assert grown <= 2**20
    record("life, memory", calls=calls, grown_bytes=max(0, grown))


def test_floating_point_mode(cpu: str, record: Callable) -> None:
    """The caller's is as it was, also after errors, and where subnormal numbers are zeros.

    XLA itself sets the rounding; the handlers alone leave that too (test_memory.py).
    """
    code = """
import ctypes, ctypes.util, platform
libm = ctypes.CDLL(ctypes.util.find_library("m"))
word, others = {  # of fenv_t, where the control bits are
    "x86_64": (7, [0x8000, 0x40, 0x8040]), "aarch64": (0, [1 << 24])}[platform.machine()]

def environment():
    found = (ctypes.c_uint32 * 16)()
    assert libm.fegetenv(found) == 0
    return found

def mode():
    return environment()[word] & ~0x3f

def choose(bits):
    chosen = environment()
    chosen[word] = bits
    assert libm.fesetenv(chosen) == 0

right = jax.jit(lambda x, y: ours(x, y, implementation="cpu"))
target = jax.ffi.ffi_call(
    "jax_bce_v3_loss", [jax.ShapeDtypeStruct((7,), np.float32)], has_side_effect=True)
attributes = {"modifiers": np.int64(0), "reduced_rank": np.int64(1), "count": np.int64(3)}
wrong = jax.jit(lambda *operands: target(*operands, **attributes))
one = np.ones((1, 1), np.float32)
default, checked = mode(), 0
for part in ((0, slice(5)), slice(None)):
    x, y = jax.device_put((logits[part], labels[part]))
    for other in (0, *others):
        choose(default | other)
        right(x, y)[1].block_until_ready()
        assert mode() == default | other
        try:
            jax.block_until_ready(wrong(np.ones((2, 3), np.float32), one, one, one))
        except Exception as error:
            assert "jax_bce: loss has 7 elements" in str(error), error
        else:
            raise AssertionError("no error")
        assert mode() == default | other
        checked += 2
choose(default)
print(checked)
"""
    calls = int(run(code).stdout)
    assert calls >= 8
    record("life, floating-point mode", calls=calls)
