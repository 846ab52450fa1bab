from typing import Any

xla_ffi_api_version: tuple[int, int]

def registrations() -> dict[str, Any]: ...
def refusal(
    operands: list[tuple[str, list[int]]],
    results: list[tuple[str, list[int]]],
    loss: bool,
    gradient: bool,
    modifiers: int,
    reduced_rank: int,
    count: int,
) -> str: ...
def instruction_set() -> str: ...
