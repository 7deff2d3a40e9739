"""The same profile on a CUDA device: events, allocator counters, framework bytes. Skipped where there is none."""

import pytest
import torch

from stagewright.planner.documents import Recompute, Source
from stagewright.profiler.memory_trace import peak_above_start
from stagewright.profiler.model_profile import profile_model
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.single_device import predict_single_device

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_a_profile_is_measured_with_the_devices_clock_and_allocator(tiny_model_file):
    profile = profile_model(
        f"{tiny_model_file}:build", microbatches=(2,), sequence_length=16, device="cuda", budget_s=1.0
    )
    block = profile.classes["Block"].costs[0]
    assert block.forward_s > 0
    assert block.activation_bytes[Recompute.NONE] > block.activation_bytes[Recompute.FULL]
    assert profile.framework_bytes > 0
    assert profile.framework_bytes_source is Source.MEASURED
    assert profile.pedigree.device == torch.cuda.get_device_name(0)


def test_the_peak_of_a_step_is_predicted(tiny_model_file):
    reference = f"{tiny_model_file}:build"
    device = torch.device("cuda", 0)
    profile = profile_model(reference, microbatches=(2,), sequence_length=16, device="cuda", budget_s=0.5)
    source = ModelSource(reference)
    model = source.build(device=device, dtype=torch.float32)
    batch = source.batch(model, 2, 16, device)

    def step():
        for _ in range(2):
            model(*batch).backward()
        model.zero_grad(set_to_none=True)

    step()
    measured = 4 * profile.num_parameters + peak_above_start(step, device)
    predicted = predict_single_device(profile, (2, 16, 1), num_microbatches=2, parameter_bytes=4, state_bytes=0)
    assert predicted.peak_bytes == pytest.approx(measured, rel=0.05)
