"""The plugin as a team uses it: its tests pass, and fail with the numbers when the plan stops fitting or gets slower."""

import json
import subprocess
import sys

import pytest
from numba.core.registry import cpu_target

import stagewright.planner.planning  # noqa: F401  (before pytester, which forgets what is imported within it)

cpu_target.target_context.refresh()  # numba imports the rest at its first kernel, and cannot do so twice

pytest_plugins = "pytester"

TEAM_TEST = """
import pytest

import stagewright.planner.planning  # noqa: F401  (before pytester, which forgets what is imported within it)


@pytest.fixture
def plan(plan_factory, profile_factory, cluster_factory):
    profile = profile_factory(8, forward_s={forward_s}, parameters=500_000_000, microbatches=(1, 2, 4))
    cluster = cluster_factory(4, memory_bytes=80e9)
    return plan_factory(profile, cluster, global_batch=16, sequence_length=128, pp=2, dp=2)


def test_fits(plan, assert_plan_fits):
    assert_plan_fits(plan, memory_bytes={memory_bytes})


def test_keeps_its_speed(plan, assert_no_plan_regression):
    assert_no_plan_regression(plan, "baseline.json", tolerance=0.01)
"""


@pytest.fixture
def project(pytester):
    """A team's test project in a folder of its own, with a committed baseline."""

    def write(*, memory_bytes=80e9, forward_s=1e-3):
        pytester.makepyfile(test_team=TEAM_TEST.format(memory_bytes=memory_bytes, forward_s=forward_s))
        return pytester

    write().runpytest_inprocess("--stagewright-update-baselines").assert_outcomes(passed=2)
    return write


def test_a_project_that_fits_and_keeps_its_speed_passes_in_a_process_of_its_own(project):
    """The plugin is found through its entry point alone."""
    folder = project().path
    assert set(json.loads((folder / "baseline.json").read_text())) == {"step_time_s", "peak_memory_bytes", "plan"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_plan_that_stops_fitting_fails_with_what_it_needs_and_what_there_is(project):
    result = project(memory_bytes=1e9).runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*does not fit: pipeline rank 0 needs * GB, a device has 1.00 GB, * GB short*"])


def test_a_plan_that_gets_slower_fails_with_both_times(project):
    result = project(forward_s=1.5e-3).runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*is worse than baseline.json by more than 1.0%: step_time_s *, was *"])


def test_a_missing_baseline_says_how_to_write_it(project):
    pytester = project()
    (pytester.path / "baseline.json").unlink()
    pytester.runpytest_inprocess().stdout.fnmatch_lines(["*baseline.json: there is no baseline yet*"])


def test_a_layout_that_cannot_fit_fails_with_the_reason(pytester):
    pytester.makepyfile(
        """
        def test_fits(plan_factory, profile_factory, cluster_factory):
            profile = profile_factory(8, parameters=500_000_000)
            plan_factory(profile, cluster_factory(4, memory_bytes=1e9), global_batch=16, sequence_length=128, pp=2, dp=2)
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no plan for mocked on mocked: *"])
