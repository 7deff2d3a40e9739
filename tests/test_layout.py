"""The shape of the project: links, import order, what the wheel holds."""

from __future__ import annotations

import subprocess
import sys
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
