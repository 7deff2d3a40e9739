"""Aceso's measured tables, where layers differ and memory binds: a faster plan than its own, with a proved gap."""

from __future__ import annotations

from stagewright.formats.aceso import cluster_from_aceso, profile_from_aceso, read_aceso_folder
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.planning import make_plan

ACESO_S = 58.76
MEMORY_BYTES = 12_000 * 2**20


def test_gpt_1_3b_on_four_v100_is_faster_than_aceso_within_a_proved_percent(peer_profiles):
    tables = read_aceso_folder(peer_profiles / "aceso", "gpt_1_3B")
    profile = profile_from_aceso(tables, num_blocks=24, sequence_length=2048, grain="block")
    cluster = cluster_from_aceso(tables, name="v100-12g", num_devices=4, memory_bytes=MEMORY_BYTES)
    space = SearchSpace(memory_headroom=0.0, max_microbatch=8, max_chunks=1)
    job = TrainingJob(global_batch=512, sequence_length=2048, precision="fp16", space=space)
    found = make_plan(profile, cluster, job, top=0)
    assert found.objective_s <= ACESO_S
    assert found.gap <= 0.01 + 1e-9
    assert max(found.plan.prediction.peak_memory_bytes) <= MEMORY_BYTES
