"""The PyTorch implementations for gpu.py, and a copy by the driver. A program is a CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cases import GATE_WORDS, Builders, Case, Program
from torch.nn.functional import binary_cross_entropy_with_logits

Function = Callable[..., Any]

PLATFORM = "gpu" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device("cuda" if PLATFORM == "gpu" else "cpu")


def facts() -> dict[str, str]:
    if PLATFORM == "gpu":
        torch.cuda.set_per_process_memory_fraction(0.45)  # JAX gets the same share
    else:
        torch.set_num_threads(1)  # a dry run should not wait for threads
    return {"platform": PLATFORM}


def _wait() -> None:
    if PLATFORM == "gpu":
        torch.cuda.synchronize()


def gate() -> Program:
    """One kernel that takes long and works in place."""
    words = torch.zeros(GATE_WORDS[PLATFORM], dtype=torch.int32, device=DEVICE)
    return Program(lambda: torch.bitwise_not(words, out=words), _wait, False)


def _loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # PyTorch requires labels of the logits' dtype.
    return binary_cross_entropy_with_logits(x, y.to(x.dtype))


def _call(case: Case, loss: Function, x: torch.Tensor, y: torch.Tensor) -> Any:
    if case.mode == "value":
        with torch.no_grad():
            return loss(x, y)
    value = loss(x, y)
    return value, torch.autograd.grad(value, x)


def _operands(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    x = (3 * torch.randn(case.n, device=DEVICE)).to(getattr(torch, case.logits))
    y = torch.randint(0, 2, (case.n,), dtype=torch.uint8, device=DEVICE)
    return x.requires_grad_(case.mode != "value"), y.to(getattr(torch, case.labels))


def _copies(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    words = case.bytes_moved // 8
    sources = [torch.ones(words, dtype=torch.int32, device=DEVICE) for _ in range(case.calls)]
    return [(torch.empty_like(source), source) for source in sources]


def _program(function: Function, operands: list[Any]) -> Program:
    def calls() -> list[Any]:
        return [function(*operand) for operand in operands]

    if PLATFORM == "cpu":
        return Program(calls, _wait, False)
    stream = torch.cuda.Stream()  # a capture needs a warm-up on another stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*operands[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls()  # kept until the end, so that each has its own buffer
    results.clear()
    return Program(graph.replay, _wait, True)


def builders(case: Case) -> Builders:
    if case.reduction != "mean":
        return {}
    torch.compiler.reset()
    if PLATFORM == "gpu":
        torch.cuda.empty_cache()
    operands = [_operands(case) for _ in range(case.calls)]
    compiled = torch.compile(_loss, dynamic=False)
    return {
        "torch": lambda: _program(partial(_call, case, _loss), operands),
        "torch.compile": lambda: _program(partial(_call, case, compiled), operands),
        "copy, torch": lambda: _program(torch.Tensor.copy_, _copies(case)),
    }
