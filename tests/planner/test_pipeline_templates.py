"""Oobleck's templates: every node count is covered, every loss of f nodes leaves a replica, the batch stays whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.documents.templates import TemplateSet
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.pipeline_templates import (
    check_losses,
    covers_of,
    has_cover,
    largest_size,
    pipeline_templates,
    split_batch,
    with_microbatches,
)
from stagewright.planner.prediction import evaluate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def test_templates_of_two_and_three_nodes_cover_every_count_from_two_on() -> None:
    for nodes in range(2, 60):
        assert has_cover(nodes, (2, 3), 1)
        assert next(covers_of(nodes, (2, 3), 1), None) is not None
    assert not has_cover(1, (2, 3), 1)


@pytest.mark.parametrize("least_nodes", [1, 2, 3])
@pytest.mark.parametrize("tolerate", [0, 1, 2, 3])
def test_every_count_from_f_plus_one_times_n0_on_has_f_plus_one_pipelines(least_nodes: int, tolerate: int) -> None:
    for total in range((tolerate + 1) * least_nodes, 14):
        sizes = tuple(range(least_nodes, largest_size(total, least_nodes, tolerate) + 1))
        for nodes in range((tolerate + 1) * least_nodes, total + 1):
            covers = list(covers_of(nodes, sizes, tolerate + 1))
            assert covers and has_cover(nodes, sizes, tolerate + 1)
            assert all(sum(cover) == nodes and len(cover) > tolerate for cover in covers)
        assert not has_cover(least_nodes - 1, sizes, 1) or least_nodes == 1


def test_every_loss_of_at_most_f_nodes_up_to_thirteen_nodes_is_covered() -> None:
    checked = 0
    for least_nodes in (1, 2, 3):
        for tolerate in (1, 2):
            for total in range((tolerate + 1) * least_nodes, 14):
                sizes = tuple(range(least_nodes, largest_size(total, least_nodes, tolerate) + 1))
                for pipelines in covers_of(total, sizes, tolerate + 1):
                    checked += check_losses(pipelines, sizes, tolerate, least_nodes)
    assert checked > 5000


def _templates(tolerate: int = 1) -> TemplateSet:
    profile = profile_factory(6, jitter=0.3, parameters=4_000_000, activation_bytes=2e6)
    job = TrainingJob(
        global_batch=24, sequence_length=128, precision="fp32", space=SearchSpace(recompute=("none", "full"))
    )
    return pipeline_templates(profile, cluster_factory(1, 6, memory_bytes=2.2e8), job, tolerate=tolerate)


def test_templates_fit_their_nodes_and_covers_use_the_whole_batch_and_all_nodes() -> None:
    found = _templates()
    assert found.least_nodes >= 2 and found.losses_checked > 0
    assert [cover.num_nodes for cover in found.covers] == list(range(6, found.least_nodes - 1, -1))
    for template in found.templates:
        assert template.plan.num_devices == template.num_nodes
        assert max(template.plan.prediction.peak_memory_bytes) <= 2.2e8 * 0.95
        assert template.plan.stages[0].degrees.dp == 1
    for cover in found.covers:
        assert sum(cover.microbatches) == 24
        assert sum(cover.pipelines) == cover.num_nodes or cover.num_nodes < 2 * found.least_nodes
        assert cover.tolerates >= 1 or cover.num_nodes < 2 * found.least_nodes


def test_the_step_of_a_template_is_affine_in_its_microbatches_and_the_split_is_the_best_of_all() -> None:
    profile = profile_factory(6, jitter=0.3, parameters=4_000_000, activation_bytes=2e6)
    found = _templates()
    by_size = {template.num_nodes: template for template in found.templates}
    for template in found.templates:
        for count in (3 * template.plan.schedule.num_ranks, 24):
            step_s = evaluate(with_microbatches(template.plan, count), profile).prediction.step_time_s
            assert step_s == pytest.approx(template.first_s + count * template.each_s, rel=0.02)
    sizes = sorted(by_size)[:2]
    pair = [by_size[sizes[0]], by_size[sizes[-1]]]
    shares = split_batch(pair, 24)
    ends = [
        max(pair[0].first_s + first * pair[0].each_s, pair[1].first_s + (24 - first) * pair[1].each_s)
        for first in range(1, 24)
    ]
    assert max(t.first_s + n * t.each_s for t, n in zip(pair, shares, strict=True)) == pytest.approx(min(ends))


def test_too_few_nodes_to_lose_so_many_are_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidArgument, match="the cluster has 6 nodes"):
        _templates(tolerate=4)


def test_the_command_prints_templates_and_covers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile_factory(4).save(tmp_path / "profile.json")
    cluster_factory(1, 3).save(tmp_path / "cluster.json")
    arguments = ["templates", str(tmp_path / "profile.json"), "--cluster", str(tmp_path / "cluster.json")]
    arguments += ["--global-batch", "12"]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cover["num_nodes"] for cover in document["covers"]] == [3, 2, 1]
    assert run(arguments) == 0
    assert "leave a replica and have a cover" in capsys.readouterr().out
