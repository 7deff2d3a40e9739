"""What a backward holds whose gradients leave as they are complete, against the allocator's own peak."""

from __future__ import annotations

import torch
from torch import nn

from stagewright.modeling import load_object, split
from stagewright.profiler.backward_phases import layer_backward_phases
from stagewright.profiler.memory_trace import peak_above_start
from stagewright.profiler.saved_bytes import layer_bytes

CPU = torch.device("cpu")


class RootNorm(nn.Module):
    """A norm that computes on after its weight's gradient is complete."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden):
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))


def phases_of(model, batch):
    chain = split(model)
    kept = layer_bytes(chain, batch).saved
    return layer_backward_phases(chain, batch, kept, CPU), kept


def tiny(file):
    model = load_object(f"{file}:Tiny")(num_blocks=3)
    for block in model.blocks:
        block.norm = RootNorm(64)
    tokens = torch.randint(32, (4, 16))
    model(tokens, tokens).backward()
    return model, (tokens, tokens)


def test_the_highest_phase_is_the_peak_of_a_backward_that_lets_gradients_go(tiny_model_file):
    model, batch = tiny(tiny_model_file)
    phases, kept = phases_of(model, batch)
    highest = max(sum(kept[:layer]) + phase.peak_bytes for layer, each in enumerate(phases) for phase in each)

    layers = [[*block.parameters()] for block in model.blocks] + [[*model.embedding.parameters()]]
    layers += [[value] for value in model.parameters() if not any(value is other for row in layers for other in row)]
    for values in layers:
        missing = {id(value) for value in values}

        def note(value, missing=missing, values=values):
            missing.discard(id(value))
            if not missing:
                for each in values:
                    each.grad = None

        for value in values:
            value.grad = None
            value.register_post_accumulate_grad_hook(note)
    assert peak_above_start(lambda: model(*batch).backward(), CPU) == highest


def test_a_norms_rest_is_a_phase_of_its_own_behind_the_last_gradients(tiny_model_file):
    model, batch = tiny(tiny_model_file)
    phases, _ = phases_of(model, batch)
    hidden = 4 * 16 * 64 * 4
    for block in phases[1:4]:
        assert [phase.ends_with for phase in block] == ["others", "none"]
        gradients = 4 * sum(value.numel() for value in model.blocks[0].parameters())
        assert block[0].peak_bytes >= gradients
        assert 2 * hidden <= block[1].peak_bytes < gradients
    assert all(value.grad is not None for value in model.parameters()), "gradients are left as they were"


def test_a_shared_weights_later_gradient_is_in_no_phase_of_the_layers_between(tiny_model_file):
    """It waits for the earlier one only where both are on a stage."""
    model, batch = tiny(tiny_model_file)
    apart, _ = phases_of(model, batch)
    model.head.weight = model.embedding.weight
    model(*batch).backward()
    tied, _ = phases_of(model, batch)
    assert tied[1:4] == apart[1:4]
