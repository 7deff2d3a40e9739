"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "stagewright",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("stagewright")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests on shared pools of ranks in one process, those that start ranks of their own in another."""
    for item in items:
        if item.get_closest_marker("ranks"):
            item.add_marker(pytest.mark.xdist_group("pools" if "rank_pools" in item.fixturenames else "own ranks"))


@pytest.fixture(scope="session")
def peer_profiles() -> Path:
    """Folder of the published profiles of other planners; skips where STAGEWRIGHT_PEER_PROFILES is unset."""
    folder = os.environ.get("STAGEWRIGHT_PEER_PROFILES")
    if not folder:
        pytest.skip("STAGEWRIGHT_PEER_PROFILES is not set to the folder of the published profiles")
    return Path(folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(Path(__file__).parents[1])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return next(folder.glob("*.whl"))
