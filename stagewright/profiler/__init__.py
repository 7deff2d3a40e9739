"""The profiler package."""
