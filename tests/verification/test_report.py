"""docs/verification.md is what report.py writes of the record, and has every make target."""

import re

import pytest
from mutation import ROOT
from report import PAGE, PROMISES, RECORDS, page

pytestmark = pytest.mark.any_jax


def test_the_page_is_of_the_record() -> None:
    assert PAGE.read_text() == page(RECORDS), "run `make verification`"


def test_every_target_is_on_the_page() -> None:
    targets = re.search(r"^verified := (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert set(targets[1].split()) == set(PROMISES)
