"""A profile that is killed at any moment goes on where it stopped; a damaged cache entry is measured again and said."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from stagewright.profiler.model_profile import profile_model

PROGRAM = """
import sys
from stagewright.profiler.model_profile import profile_model
profile_model(sys.argv[1] + ":build", microbatches=(1, 2), sequence_length=16, device="cpu", budget_s=3.0,
              cache=sys.argv[2], resume=True)
"""


def lines(cache):
    files = list((cache / "journals").glob("*.jsonl")) if (cache / "journals").is_dir() else []
    return files[0].read_text().splitlines() if files else []


def whole(texts):
    found = []
    for text in texts:
        try:
            found.append(json.loads(text)[1])
        except ValueError:
            continue
    return found


def kill_after(seed, model, cache):
    """Start a profile, kill it once a random number of measurements is done and a random moment has passed."""
    choice = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(model), str(cache)], env=environment)
    wanted = len(lines(cache)) + choice.randint(1, 6)
    deadline = time.monotonic() + 60
    while len(lines(cache)) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(choice.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_interrupted(seed, model, cache):
    kill_after(seed, model, cache)
    before = whole(lines(cache))
    assert before, "the profile was killed before its first measurement"
    made = []
    profile = profile_model(
        f"{model}:build",
        microbatches=(1, 2),
        sequence_length=16,
        device="cpu",
        budget_s=0.2,
        cache=cache,
        resume=True,
        progress=lambda phase, done, total: made.append((phase, done)),
    )
    kept = sum(min(count, wanted) for count, wanted in _counts(before).values())
    first = next(done for phase, done in made if phase == "profile")
    assert first == kept, "every finished measurement counts"
    assert all([cost.key for cost in value.costs] == [(1, 16, 1), (2, 16, 1)] for value in profile.classes.values())


def _counts(records):
    from stagewright.profiler.session import WANTED

    counts = {}
    for configuration, kind, _ in records:
        key = (tuple(configuration), kind)
        counts[key] = (counts.get(key, (0, 0))[0] + 1, WANTED[kind])
    return counts


def test_a_killed_profile_keeps_every_finished_measurement(tiny_model_file, tmp_path):
    check_interrupted(0, tiny_model_file, tmp_path / "cache")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_at_twenty_random_moments(seed, tiny_model_file, tmp_path):
    check_interrupted(seed, tiny_model_file, tmp_path / "cache")


def test_a_damaged_cache_entry_is_measured_again_and_said(tiny_model_file, tmp_path, caplog):
    settings = {"microbatches": (1,), "sequence_length": 16, "device": "cpu", "budget_s": 0.1, "cache": tmp_path}
    first = profile_model(f"{tiny_model_file}:build", **settings)
    entries = sorted((tmp_path / "layers").iterdir())
    block = next(path for path in entries if '"kind"' not in path.read_text() and "forward_s" in path.read_text())
    block.write_text(block.read_text()[:-30])
    with caplog.at_level(logging.WARNING):
        second = profile_model(f"{tiny_model_file}:build", **settings)
    assert any(f"the cache entry {block.name} was damaged" in text for text in second.pedigree.warnings)
    assert block.name in caplog.text
    changed = [name for name in first.classes if first.classes[name] != second.classes[name]]
    assert len(changed) == 1, "the other layers' entries were kept"
    third = profile_model(f"{tiny_model_file}:build", **settings)
    assert third.classes == second.classes
    assert third.pedigree.warnings == ()


def test_changed_code_is_measured_again(tiny_model_file, tmp_path):
    settings = {"microbatches": (1,), "sequence_length": 16, "device": "cpu", "budget_s": 0.1, "cache": tmp_path}
    profile_model(f"{tiny_model_file}:build", **settings)
    phases = []
    changed = tiny_model_file.with_name("changed_model.py")
    changed.write_text(tiny_model_file.read_text().replace("functional.gelu", "functional.silu"))
    profile_model(f"{changed}:build", progress=lambda phase, done, total: phases.append(phase), **settings)
    assert "profile" in phases
    phases.clear()
    profile_model(f"{changed}:build", progress=lambda phase, done, total: phases.append(phase), **settings)
    assert "profile" not in phases
