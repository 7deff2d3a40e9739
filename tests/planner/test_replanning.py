"""Replanning keeps the global batch and accounts for every byte of state: it stays, moves from a holder, or is restored."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.documents import Plan, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.migration import migration
from stagewright.planner.planning import make_plan
from stagewright.planner.search.verify import verify_certificate
from stagewright.planner.state_layout import state_pieces
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(6, jitter=0.3, parameters=4_000_000, tensor_degrees=(1, 2), microbatches=(1, 2, 4))
CLUSTER = cluster_factory(4, 2)
CELLS = 240


def _plan(devices: int, *, gap: float = 0.0, previous: Plan | None = None, **pins: object) -> Plan:
    space = SearchSpace(pins=Pins.model_validate(pins), schedules=("1f1b", "interleaved"), zero=(0, 1, 3), max_chunks=2)
    job = TrainingJob(global_batch=24, sequence_length=128, precision="fp32", space=space)
    found = make_plan(PROFILE, CLUSTER, job, num_devices=devices, gap=gap, previous=previous).plan
    assert found is not None
    return found


def _cells(plan: Plan) -> dict[tuple[int, int, str, int], float]:
    """Return the bytes of each (device, layer, item, cell) that a plan holds, state cut into equal cells."""
    found: dict[tuple[int, int, str, int], float] = {}
    for device, piece in state_pieces(plan, PROFILE):
        for cell in range(round(piece.start * CELLS), round(piece.end * CELLS)):
            found[device, piece.layer, piece.kind + piece.item, cell] = piece.whole_bytes / CELLS
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    list(
        product(
            [{"dp": 4, "pp": 2, "zero": 0}, {"tp": 2, "pp": 2, "dp": 2, "zero": 1}, {"dp": 8, "zero": 3}],
            [{"dp": 3, "pp": 2, "zero": 0}, {"tp": 2, "pp": 3, "zero": 0}, {"dp": 6, "zero": 3}],
        )
    ),
)
def test_kept_moved_and_restored_bytes_are_those_of_a_count_over_cells(
    before: dict[str, object], after: dict[str, object]
) -> None:
    first, second = _plan(8, **before), _plan(6, **after)
    found = migration(first, second, PROFILE)
    held, needed = _cells(first), _cells(second)
    kept = sum(size for key, size in needed.items() if key in held)
    missing = {key: size for key, size in needed.items() if key not in held}
    survivors = {(layer, item, cell) for device, layer, item, cell in held if device < 6}
    restored = sum(size for key, size in missing.items() if key[1:] not in survivors)
    assert found.kept_bytes == pytest.approx(kept, rel=1e-9)
    assert found.restored_bytes == pytest.approx(restored, rel=1e-9, abs=1.0)
    assert found.moved_bytes == pytest.approx(sum(missing.values()) - restored, rel=1e-9, abs=1.0)
    assert sum(move.bytes for move in found.moves) == pytest.approx(sum(missing.values()), rel=1e-9, abs=1.0)
    names = PROFILE.layer_names
    for move in found.moves:
        layer = names.index(move.layer)
        wanted = sum(size for key, size in missing.items() if key[:2] == (move.target, layer))
        assert move.bytes <= wanted * (1 + 1e-9)
        if move.source is not None:
            assert move.source < 6 and move.source != move.target
            assert any(key[:2] == (move.source, layer) for key in held)


def test_every_parameter_and_optimizer_byte_is_held_and_sharded_state_once() -> None:
    optimizer = TrainingJob(global_batch=1, sequence_length=1, precision="fp32").optimizer
    for pins in ({"dp": 8, "zero": 3}, {"tp": 2, "pp": 2, "dp": 2, "zero": 1}):
        plan = _plan(8, **pins)
        total = sum(layer.parameters for layer in (PROFILE.classes[name] for name in PROFILE.layer_classes))
        held = {"parameters": 0.0, "optimizer": 0.0}
        for _, piece in state_pieces(plan, PROFILE):
            held[piece.item] += piece.size_bytes
        assert held["optimizer"] == pytest.approx(total * optimizer.state_bytes)
        copies = 1 if pins["zero"] == 3 else pins["dp"]
        assert held["parameters"] == pytest.approx(total * optimizer.parameter_bytes * copies)


def test_from_eight_devices_to_six_the_global_batch_stays_and_nothing_is_lost() -> None:
    before = _plan(8, dp=4, pp=2, zero=0)
    free = before.model_copy(
        update={"job": before.job.model_copy(update={"space": before.job.space.model_copy(update={"pins": Pins()})})}
    )
    outcome = make_plan(PROFILE, CLUSTER, free.job, num_devices=6, gap=0.0, previous=free)
    after = outcome.plan
    assert after is not None and outcome.migration is not None and after.num_devices <= 6
    spec = after.schedule
    assert spec.microbatch * spec.num_microbatches * after.stages[0].degrees.dp == before.job.global_batch
    assert outcome.migration.restored_bytes == 0
    alone = make_plan(PROFILE, CLUSTER, free.job, num_devices=6, gap=0.0)
    assert outcome.objective_s == pytest.approx(alone.objective_s, rel=1e-9) and outcome.status == "optimal"
    verify_certificate(after, PROFILE)


def test_a_larger_gap_lets_more_state_stay_and_the_step_stays_within_it() -> None:
    before = _plan(8, pp=4, dp=2, zero=0)
    job = before.job.model_copy(update={"space": before.job.space.model_copy(update={"pins": Pins()})})
    moved = []
    for gap in (0.0, 0.5):
        outcome = make_plan(PROFILE, CLUSTER, job, num_devices=6, gap=gap, previous=before)
        assert outcome.migration is not None and outcome.gap is not None and outcome.gap <= gap + 1e-6
        moved.append(outcome.migration.moved_bytes + outcome.migration.restored_bytes)
    assert moved[1] < moved[0]


def test_the_same_devices_keep_everything_where_it_is() -> None:
    before = _plan(8)
    outcome = make_plan(PROFILE, CLUSTER, before.job, gap=0.0, previous=before)
    assert outcome.migration is not None and outcome.migration.moves == ()
    assert outcome.migration.seconds == 0 and outcome.migration.kept_bytes > 0


def test_another_global_batch_is_refused_with_both_numbers() -> None:
    before = _plan(8)
    with pytest.raises(InvalidArgument, match="global batch of 24, this job 12"):
        make_plan(PROFILE, CLUSTER, before.job.model_copy(update={"global_batch": 12}), previous=before)


def test_the_command_takes_job_and_cluster_from_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PROFILE.save(tmp_path / "profile.json")
    _plan(8).save(tmp_path / "plan.json")
    arguments = ["plan", str(tmp_path / "profile.json"), "--from", str(tmp_path / "plan.json"), "--devices", "6"]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["job"]["global_batch"] == 24
    assert {"layer", "source", "target", "bytes"} == set(document["migration"]["moves"][0])
    assert run(arguments) == 0
    assert "move to" in capsys.readouterr().out
