"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def peer_profiles() -> Path:
    """Folder of the published profiles of other planners; skips where STAGEWRIGHT_PEER_PROFILES is unset."""
    folder = os.environ.get("STAGEWRIGHT_PEER_PROFILES")
    if not folder:
        pytest.skip("STAGEWRIGHT_PEER_PROFILES is not set to the folder of the published profiles")
    return Path(folder)
