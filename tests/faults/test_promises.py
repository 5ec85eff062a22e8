"""The documentation's promises and the tests are held to each other: no row without a test, no dangling name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from tests.faults.conftest import rows

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = yaml.safe_load(Path(__file__).with_name("promises.yaml").read_text(encoding="utf-8"))
"""`{document: {first cell of a row: {test file: [test functions]}}}`."""


def first_cells(document: str) -> list[str]:
    """The first cell of every row of the document's tables, without their heads."""
    lines = [line for line in (REPOSITORY / document).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rules = {number for number, line in enumerate(lines) if re.fullmatch(r"[|:\- ]+", line)}
    heads = rules | {number - 1 for number in rules}
    return [line.split("|")[1].strip() for number, line in enumerate(lines) if number not in heads]


def defined(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", TESTS)
def test_every_row_has_its_tests_and_they_exist(document: str) -> None:
    promised = TESTS[document]
    assert len(promised) >= 10
    assert first_cells(document) == list(promised)
    named = [(file, name) for tests in promised.values() for file, names in tests.items() for name in names]
    assert named
    assert [(file, name) for file, name in named if name not in defined(file)] == []


def test_every_event_of_the_table_of_faults_is_promised_and_no_other() -> None:
    assert first_cells("docs/promises.md") == [row.text for row in rows().values()]
