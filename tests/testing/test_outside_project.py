"""A team's project of its own: it installs the wheel, without torch, and its CI fails when its plan stops fitting."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

TEAM_TEST = """
import importlib.util

import pytest
import stagewright


def test_torch_is_not_installed():
    assert importlib.util.find_spec("torch") is None


def test_the_package_is_the_installed_one():
    assert "site-packages" in stagewright.__file__


def test_our_layout_fits_80_gb(
    plan_factory, profile_factory, cluster_factory, assert_plan_fits, assert_no_plan_regression
):
    profile = profile_factory(8, parameters={parameters}, microbatches=(1,))
    plan = plan_factory(profile, cluster_factory(2, memory_bytes=141e9), global_batch=8, sequence_length=128, pp=2, zero=0)
    assert_plan_fits(plan, memory_bytes=80e9)
    assert_no_plan_regression(plan, "baseline.json", tolerance=0.01)
"""


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment that holds the wheel, what it needs, and pytest."""
    home = tmp_path_factory.mktemp("team") / "environment"
    venv.create(home, with_pip=True)
    interpreter = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--constraint", str(CONSTRAINTS), str(wheel), "pytest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode and "from versions: none" in done.stderr:
        pytest.skip("no package index can be reached to fill a fresh environment")
    assert done.returncode == 0, done.stderr[-2000:]
    return interpreter


def outside(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder outside this tree; uncompiled, for these problems are too small to compile for."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["NUMBA_DISABLE_JIT"] = "1"
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def ci(python, tmp_path):
    """The team's CI: write its tests, run pytest in its environment, return the finished process."""

    def run(*options: str, parameters: int) -> subprocess.CompletedProcess[str]:
        test = TEAM_TEST.format(parameters=parameters)
        (tmp_path / "test_team.py").write_text(test)
        return outside([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options], tmp_path)

    return run


def test_a_project_with_the_wheel_pins_its_plan_and_fails_when_it_stops_fitting_80_gb(ci):
    written = ci("--stagewright-update-baselines", parameters=500_000_000)
    assert written.returncode == 0, written.stdout + written.stderr
    assert "3 passed" in written.stdout
    grown = ci(parameters=1_300_000_000)
    assert grown.returncode == 1, grown.stdout
    assert "1 failed, 2 passed" in grown.stdout
    said = re.search(r"does not fit: pipeline rank \d needs ([\d.]+) GB, a device has 80[\d.]* GB", grown.stdout)
    assert said is not None, grown.stdout
    assert 80 < float(said[1]) < 141


def test_the_wheel_plans_without_torch(python, tmp_path):
    command = [str(python), "-m", "stagewright", "plan", "gpt2", "--cluster", "h100-sxm:2x1", "--global-batch", "8"]
    done = outside([*command, "--sequence-length", "512", "--pin", "schedule=1f1b", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["plan"]["prediction"]["step_time_s"] > 0
