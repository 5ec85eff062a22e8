"""The documentation's promises and the tests are held to each other: no promise without a test, no dangling name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.faults.conftest import rows

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "docs" / "promises.md", REPOSITORY / "docs" / "threat-model.md"]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def table(document: Path) -> list[list[str]]:
    """The cells of every row of the document's tables, without their heads."""
    lines = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [number for number, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    heads = {*rules, *(number - 1 for number in rules)}
    return [row for number, row in enumerate(cells) if number not in heads]


def defined(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_row_names_a_test(document: Path) -> None:
    found = table(document)
    assert len(found) >= 10
    assert [row[0] for row in found if not REFERENCE.search(row[-1])] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    references = REFERENCE.findall(document.read_text(encoding="utf-8"))
    assert references
    assert [(file, name) for file, name in references if name not in defined(file)] == []


def test_every_event_of_the_table_of_faults_is_promised_and_no_other() -> None:
    """Those that only real Ray workers can show are wanted as soon as there are such tests."""
    with_ray = (REPOSITORY / "tests" / "faults" / "test_kills_with_ray.py").exists()
    promised = [row[0] for row in table(DOCUMENTS[0])]
    assert promised == [row.text for row in rows().values() if with_ray or not row.needs_ray or row.text in promised]
