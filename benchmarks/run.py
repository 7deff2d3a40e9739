"""Runs every benchmark; each writes its own file under benchmarks/results/.

Usage: python benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = {"run", "soak", "machine", "__init__", "peers"}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; return 1 when any failed."""
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    failed = []
    for script in scripts:
        if names and script.stem not in names:
            continue
        print(f"== {script.stem}", flush=True)
        if subprocess.run([sys.executable, str(script)], cwd=FOLDER.parent, check=False).returncode:
            failed.append(script.stem)
    if failed:
        print("failed: " + ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
