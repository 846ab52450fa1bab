"""Which tests a run without `--all` leaves out: those that are slow, and most cases of a grid.

A test marked `thorough` is left out. Every other test is run; `make test` also leaves out those
marked `second`. A parametrized one runs with a few of its cases, chosen so that each value of each
parameter is used with each kernel. XLA's own code does not get each value: it has at least one case
of each test. The choice is the same in every run. Of the examples that hypothesis draws, a fifth is
tested.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import pytest

# Whether this run has the option `--all`.
everything = False
# A run without `--all` draws this many times fewer examples with hypothesis.
FEWER = 5


def examples(number: int) -> int:
    """How many examples hypothesis draws in this run, if a run with `--all` draws `number`."""
    return number if everything else -(-number // FEWER)


def cover(cases: Sequence[Iterable[Hashable]]) -> list[int]:
    """The indices of a few cases that together contain every member of all cases.

    A greedy choice: the next case is the one that adds the most new members, and among equals the
    one whose members were chosen least often.
    """
    missing = {member for case in cases for member in case}
    seen = Counter[Hashable]()
    chosen: list[int] = []
    while missing or not chosen:
        place = min(
            range(len(cases)),
            key=lambda place: (
                -len(missing.intersection(cases[place])),
                sum(seen[member] for member in cases[place]),
            ),
        )
        chosen.append(place)
        missing.difference_update(cases[place])
        seen.update(cases[place])
    return sorted(chosen)


def members(item: pytest.Item) -> list[Hashable]:
    """What a case covers: the values of its parameters, alone and together with its kernel."""
    call = getattr(item, "callspec", None)
    values = {name: repr(value) for name, value in call.params.items()} if call else {}
    implementation = values.get("implementation", "xla")
    alone = [*values.items()]
    return alone if "xla" in implementation else alone + [(*one, implementation) for one in alone]


def of(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests of this run, in their order."""
    if everything:
        return list(items)
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if not item.get_closest_marker("thorough"):
            tests[item.nodeid.partition("[")[0]].append(item)
    return [cases[place] for cases in tests.values() for place in cover([*map(members, cases)])]
