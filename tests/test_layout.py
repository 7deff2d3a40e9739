"""The shape of the project: links, import order, and a wheel that plans without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["planner", "profiler", "api"])
def test_the_root_links_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("stagewright") / name
    assert (link / "__init__.py").is_file()


def test_imports_run_one_way():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_plan_help_imports_neither_torch_nor_the_solvers():
    code = (
        "import sys; from stagewright.cli.main import run; run(['plan', '--help']);"
        "heavy = {'torch', 'numba', 'scipy', 'highspy', 'pulp', 'fastapi'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_wheel_holds_the_package_once_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "stagewright/cli/systems_data/rows.json" in names
    assert "stagewright/formats/templates/timeline.html" in names
    assert not [name for name in names if name.startswith(("planner/", "profiler/", "api/", "tests/"))]


def test_the_wheel_plans_in_an_environment_without_torch(wheel, tmp_path):
    """An environment that sees this one's packages, except torch, which raises when it is imported."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*/site-packages"))
    blocked = tmp_path / "blocked" / "torch"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('torch is not installed here')\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packages = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": f"{site}:{tmp_path / 'blocked'}:{packages}"}
    command = [str(home / "bin" / "python"), "-m", "stagewright", "plan", "llama2-7b", "--cluster", "h100-sxm:8x1"]
    command += ["--global-batch", "64", "--sequence-length", "2048", "--json"]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout)
    assert outcome["plan"]["prediction"]["step_time_s"] > 0
