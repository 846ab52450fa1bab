"""What a run without `--all` leaves out: most cases of a grid, what takes long, most examples.

Every test is run, but for those marked `thorough`. Of a parametrized one, cases are chosen in which
each value of each parameter occurs, and does so with each kernel. XLA's own code has one case or
more. The choice is the same in every run.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import pytest

# Whether this run has the option `--all`.
everything = False
# Of the examples that hypothesis draws in a run with `--all`, a run without it has one in so many.
FEWER = 5


def examples(number: int) -> int:
    """How many examples hypothesis draws where a run with `--all` has `number`."""
    return number if everything else -(-number // FEWER)


def cover(cases: Sequence[Iterable[Hashable]]) -> list[int]:
    """The places of a few cases in which everything that is in any of them occurs.

    Each is the one that adds most, then the one whose members were seen least.
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
    """What a case is to stand for: its parameters' values, which may be of any type."""
    call = getattr(item, "callspec", None)
    values = {name: repr(value) for name, value in call.params.items()} if call else {}
    implementation = values.get("implementation", "xla")
    alone = [*values.items()]
    return alone if "xla" in implementation else alone + [(*one, implementation) for one in alone]


def of(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those that this run has, in their order."""
    if everything:
        return list(items)
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if not item.get_closest_marker("thorough"):
            tests[item.nodeid.partition("[")[0]].append(item)
    return [cases[place] for cases in tests.values() for place in cover([*map(members, cases)])]
