"""The table of breaks fits the sources, so that each can be applied."""

import pytest
from mutation import ROOT, table

pytestmark = pytest.mark.any_jax


def test_each_break_is_possible() -> None:
    assert len({mutation.key for mutation in table()}) == len(table()) >= 60
    for mutation in table():
        text = (ROOT / mutation.file).read_text()
        assert mutation.applied(text) != text
        for test in {*mutation.tests} - {"--all"}:
            assert (ROOT / test.partition("::")[0]).is_file()
