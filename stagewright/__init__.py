"""Stagewright measures a model, solves for its parallel training plan with a proof, and runs the plan."""

__version__ = "0.1.0"
