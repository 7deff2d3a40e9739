"""The pytest plugin: fixtures to plan on mocked hardware and to pin what a plan may cost.

It is loaded through the entry point `pytest11`, so it imports nothing of weight before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stagewright.planner.documents import Cluster, ModelProfile


@pytest.fixture
def profile_factory() -> Callable[..., ModelProfile]:
    """The function `stagewright.testing.profile_factory`."""
    from stagewright.testing.mocked_profile import profile_factory as factory

    return factory


@pytest.fixture
def cluster_factory() -> Callable[..., Cluster]:
    """The function `stagewright.testing.cluster_factory`."""
    from stagewright.testing.mocked_cluster import cluster_factory as factory

    return factory
