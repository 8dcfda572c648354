"""The mutations still fit the code (`python tests/mutations.py` runs them)."""

from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_changes_one_place_and_names_tests(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert all((ROOT / "tests" / name).exists() for name in mutation.tests.split())


def test_every_mutation_is_in_the_table():
    table = (ROOT / "docs" / "mutations.md").read_text()
    assert all(f"| {mutation.name} |" in table for mutation in MUTATIONS)
    assert len(MUTATIONS) >= 40
