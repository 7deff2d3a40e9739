"""Mocked profiles and clusters, and a pytest plugin that pins a training plan in a team's own tests."""

from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory

__all__ = ["cluster_factory", "mixed_cluster_factory", "profile_factory"]
