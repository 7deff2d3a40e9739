"""What speaks against a measurement is said in words, with the numbers."""

import os
import shutil
import stat

import pytest
import torch

from stagewright.profiler.surroundings import DeviceState, device_state, disturbances, num_foreign

QUIET = DeviceState(clock_hz={})


def test_a_quiet_device_gives_no_warning():
    assert disturbances(QUIET, QUIET, [1.0, 0.99, 0.98], drift=0.01) == ()


def test_throttling_is_said_with_its_reason():
    state = DeviceState(clock_hz={"sm": 1.2e9}, throttle_reasons=("hw thermal slowdown",))
    assert disturbances(QUIET, state, [], drift=0.0) == ("the device was throttled: hw thermal slowdown",)


def test_other_processes_a_shared_core_and_drift_are_said():
    shared = DeviceState(clock_hz={}, num_foreign_processes=2)
    assert disturbances(shared, QUIET, [0.6, 0.5, 0.7], drift=0.2) == (
        "2 other processes used the device",
        "the processor was shared: this rank had 60% of its core; seconds are those of its own time",
        "speed drifted by 20% while measuring",
    )


def test_this_process_is_not_foreign_whatever_number_the_driver_knows_it_by():
    assert num_foreign({os.getpid(), 7}) == 1
    assert num_foreign({4242}) == 0
    assert num_foreign(set()) == 0


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize("word", ["clocks_throttle", "clocks_event"])
def test_clocks_and_reasons_are_read_from_either_generation_of_drivers(tmp_path, monkeypatch, word):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'*{word}*) echo "1410, 1980, 2619, 61, 700.00, 550.54, Not Active, Active, Not Active, Not Active";;\n'
        "*compute-apps*) printf '11\\n12\\n';;\n"
        "*) exit 2;;\n"
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    state = device_state(torch.device("cuda", 0))
    assert state.clock_hz == {"sm": 1.41e9, "sm_max": 1.98e9, "memory": 2.619e9}
    assert state.throttle_reasons == ("sw thermal slowdown",)
    assert (state.driver, state.num_foreign_processes) == ("550.54", 1)
