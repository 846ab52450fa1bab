"""docs/transforms.md says what is measured: kernel launches, passes and traffic of each mode."""

import re
from pathlib import Path

import jaxlib
import pytest
import transforms
from transforms import MODES, cost

TEXT = (Path(__file__).parent.parent / "docs" / "transforms.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in row.split("|")]
        for row in re.findall(r"^\| (.* \| .*) \|$", TEXT, re.M)
    )
    if cells[0] in MODES
}


def test_every_mode_is_documented() -> None:
    assert list(ROWS) == list(MODES)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.second
def test_documented_cost(cpu: str, name: str) -> None:
    """What is the kernel alone, with every XLA; what XLA adds, with the one that the page names."""
    found, row = cost(name), ROWS[name]
    alone = row[1] == "0" and not name.startswith(("linear_loss", "siglip_loss"))
    if f"jaxlib {jaxlib.__version__}," in TEXT or alone:
        assert transforms.cells(found) == row
    else:
        assert (found.kernels > 0) == (row[0] != "0")
