"""Known vulnerabilities of the pinned dependencies: `make audit`.

pip-audit asks a vulnerability service over the network. What it could not ask about is not known to be safe: this says
so and fails. It is not part of the gate for that reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
NOT_KNOWN = 3


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Exit code and text for pip-audit's JSON: 1 with the vulnerabilities, 3 if something was not asked about."""
    dependencies = report["dependencies"]
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    found = [
        f"{each['name']} {each['version']}: {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for each in dependencies
        for vulnerability in each.get("vulns", [])
    ]
    lines = [*found, f"audit: {len(dependencies) - len(skipped)} asked about, {len(found)} known vulnerabilities"]
    if skipped:
        lines.append(f"audit: nothing is known of {len(skipped)}: {', '.join(skipped[:5])}{' …' * (len(skipped) > 5)}")
    return (1 if found else NOT_KNOWN if skipped else 0), "\n".join(lines)


def main() -> int:
    """Audit every pin of constraints.txt."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--progress-spinner=off", "--format=json"], capture_output=True, text=True)
    try:
        code, text = verdict(json.loads(done.stdout))
    except ValueError:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        code = NOT_KNOWN
        text = f"audit: the vulnerability service could not be asked, so nothing is known ({last[0][:300]})"
    print(text, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
