"""`make audit`: what could not be asked about is never taken for safe."""

from typing import Any

import pytest

from tests.faults.audit import verdict

SAFE = {"name": "numpy", "version": "2.4.6", "vulns": []}
HOLED = {"name": "ray", "version": "2.0.0", "vulns": [{"id": "CVE-2023-48022", "fix_versions": ["2.8.1"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("dependencies", "code", "said"),
    [
        ([SAFE], 0, "audit: 1 asked about, 0 known vulnerabilities"),
        ([SAFE, HOLED, SKIPPED], 1, "ray 2.0.0: CVE-2023-48022, fixed in 2.8.1"),
        ([SAFE, SKIPPED], 3, "audit: nothing is known of 1: torch"),
        ([SKIPPED] * 7, 3, "audit: nothing is known of 7: torch, torch, torch, torch, torch …"),
    ],
)
def test_what_was_not_asked_about_is_no_pass(dependencies: list[dict[str, Any]], code: int, said: str) -> None:
    found, text = verdict({"dependencies": dependencies, "fixes": []})
    assert found == code
    assert said in text.splitlines()
