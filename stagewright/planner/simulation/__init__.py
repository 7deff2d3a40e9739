"""Checks and times schedules: validator, NCCL checker, simulators, makespan kernel, bounds."""
