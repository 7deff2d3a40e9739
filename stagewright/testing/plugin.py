"""The pytest plugin: fixtures to plan on mocked hardware and to pin what a plan may cost.

    def test_our_layout_fits(plan_factory, assert_plan_fits, assert_no_plan_regression):
        plan = plan_factory("llama2-13b", "a100-sxm-80g:8x4", global_batch=512, sequence_length=4096, tp=8)
        assert_plan_fits(plan, memory_bytes=80e9)
        assert_no_plan_regression(plan, "baselines/llama2-13b.json", tolerance=0.02)

It is loaded through the entry point `pytest11`, so nothing of weight is imported before a fixture is used. No test needs
torch or a device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stagewright.planner.documents import Cluster, ModelProfile, Plan, Prediction

_UPDATE = "--stagewright-update-baselines"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes baselines."""
    group = parser.getgroup("stagewright")
    group.addoption(
        _UPDATE, action="store_true", default=False, help="Write the baselines of assert_no_plan_regression anew."
    )


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


@pytest.fixture
def plan_factory() -> Callable[..., Plan]:
    """A function that plans a model (profile or catalogue name) on a cluster, with degrees pinned by keyword."""
    from stagewright.planner.documents.job import PIN_NAMES
    from stagewright.planner.errors import Infeasible, NoIncumbent
    from stagewright.testing.plan_checks import plan_for

    def factory(model: ModelProfile | str, cluster: Cluster | str, **settings: object) -> Plan:
        pins = {name: settings.pop(name) for name in PIN_NAMES if name in settings}
        try:
            return plan_for(model, cluster, pins=pins, **settings)  # type: ignore[arg-type]
        except (Infeasible, NoIncumbent) as error:
            pytest.fail(
                f"{error.message} (what would fit: {error.hint})" if error.hint else error.message, pytrace=False
            )

    return factory


@pytest.fixture
def assert_plan_fits() -> Callable[..., Prediction]:
    """A check that every rank of a plan fits its device; see `plan_checks.check_plan_fits`."""
    from stagewright.testing.plan_checks import check_plan_fits

    return check_plan_fits


@pytest.fixture
def assert_no_plan_regression(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A check that a plan is no worse than a baseline file, whose path is relative to the test's file."""
    from stagewright.testing.plan_checks import DEFAULT_TOLERANCE, check_no_regression

    folder = request.path.parent
    update = bool(request.config.getoption(_UPDATE))

    def check(plan: Plan | Path | str, baseline: Path | str, tolerance: float = DEFAULT_TOLERANCE) -> None:
        check_no_regression(plan, folder / baseline, tolerance=tolerance, update=update)

    return check
