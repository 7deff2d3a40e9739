"""Runs the tests marked `soak` in parts that each end within an hour, and leaves benchmarks/results/soak.json.

Usage: python benchmarks/soak.py [PART ...]; a part is a folder or a file under tests, all folders unless told. Parts that
are not run keep their rows of the last result.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PART_LIMIT_S = 3600
_COUNTS = re.compile(r"(\d+) (passed|failed|error|errors|skipped)")


def main(parts: list[str]) -> int:
    """Run the parts one after the other; return 1 when any failed."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import machine

    folders = parts or sorted(
        entry.name for entry in (ROOT / "tests").iterdir() if entry.is_dir() and any(entry.rglob("test_*.py"))
    )
    rows = []
    for folder in folders:
        print(f"soak: {folder} ...", flush=True)
        rows.append(_run(folder))
        print(f"  {rows[-1]}", flush=True)
    target = ROOT / "benchmarks" / "results" / "soak.json"
    target.parent.mkdir(exist_ok=True)
    kept = json.loads(target.read_text())["parts"] if parts and target.exists() else []
    made = {row["part"]: row for row in [*kept, *rows]}
    result = {**machine("python benchmarks/soak.py " + " ".join(parts)), "parts": [made[part] for part in sorted(made)]}
    target.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["exit_code"] not in (0, 5) for row in rows))


def _run(folder: str) -> dict[str, object]:
    command = [sys.executable, "-m", "pytest", f"tests/{folder}", "-m", "soak", "-q", "--timeout", str(PART_LIMIT_S)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PART_LIMIT_S, check=False)
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = (
            124,
            (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else str(error.stdout or ""),
        )
    last = output.strip().splitlines()[-1] if output.strip() else ""
    counts = {word.rstrip("s"): int(count) for count, word in _COUNTS.findall(last)}
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    row = {
        "part": folder,
        "date": f"{date.today()}",
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
    }
    return {**row, **counts, **({"failures": failed} if failed else {})}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
