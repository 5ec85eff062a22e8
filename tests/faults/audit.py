"""Known vulnerabilities of the pinned dependencies: `make audit`.

pip-audit asks a vulnerability service over the network. Where none can be reached, nothing is known, and this says so
and fails; it is not part of the gate for that reason.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def main() -> int:
    """Audit every pin of constraints.txt; pip-audit's exit code, or 3 where it could not ask."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--progress-spinner=off"], capture_output=True, text=True)
    asked = "No known vulnerabilities found" in done.stdout + done.stderr or "Fix Versions" in done.stdout
    if asked:
        print(done.stdout or done.stderr)
        return done.returncode
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
    print(
        f"audit: the vulnerability service could not be asked, so nothing is known ({last[0][:300]})", file=sys.stderr
    )
    return 3


if __name__ == "__main__":
    sys.exit(main())
