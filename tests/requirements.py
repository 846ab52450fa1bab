"""What extras need, without the package itself: one requirement per line.

python tests/requirements.py test lint
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def of(extras: Iterable[str]) -> set[str]:
    found = set(PROJECT["dependencies"])
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", requirement)
            found |= of(own[1].split(",")) if own else {requirement}
    return found


if __name__ == "__main__":
    print(*sorted(of(sys.argv[1:])), sep="\n")
