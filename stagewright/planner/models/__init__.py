"""Analytic model profiles from Hugging Face configs and layer tables, without torch and without weights."""

from stagewright.planner.models.hugging_face import profile_from_config

__all__ = ["profile_from_config"]
