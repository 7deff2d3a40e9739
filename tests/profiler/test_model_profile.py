"""The profile of a small model: what it holds, and that its numbers mean what the document says."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stagewright.planner.documents import ModelProfile, Recompute, Source
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.profiler.model_profile import profile_model


@pytest.fixture(scope="module")
def profile(shared_tiny_model_file):
    return profile_model(
        f"{shared_tiny_model_file}:build", microbatches=(1, 2), sequence_length=16, budget_s=0.5, device="cpu"
    )


def cost(profile, layer, microbatch=1):
    index = profile.layer_names.index(layer)
    entries = profile.classes[profile.layer_classes[index]].costs
    return next(entry for entry in entries if entry.microbatch == microbatch)


def test_layers_are_named_by_their_modules_and_equal_ones_declared_once(profile):
    assert [(run.name, run.count) for run in profile.layers] == [
        ("embedding", 1),
        ("blocks.{}", 3),
        ("head", 1),
        ("loss", 1),
    ]
    assert profile.num_parameters == 32 * 64 + 3 * (64 * 256 * 2 + 256 + 64 + 128) + 64 * 32


def test_every_configuration_has_measured_costs(profile):
    for value in profile.classes.values():
        assert [entry.key for entry in value.costs] == [(1, 16, 1), (2, 16, 1)]
        assert all(entry.source is Source.MEASURED for entry in value.costs)
    assert cost(profile, "blocks.0").forward_s > 0
    assert cost(profile, "blocks.0").weight_grad_s > 0
    assert cost(profile, "blocks.0").optimizer_s > 0


def test_kept_bytes_are_those_that_autograd_saves(profile):
    """LayerNorm keeps its input and two statistics; linear layers their inputs; GELU its input.

    Full recomputation keeps the layer's input and the state of the random generator.
    """
    tokens, width, float_bytes = 2 * 16, 64, 4
    kept = cost(profile, "blocks.1", 2).activation_bytes
    elements = width + 2 + width + 4 * width + 4 * width
    assert kept[Recompute.NONE] == tokens * elements * float_bytes
    generator_state = torch.get_rng_state().numel()
    assert kept[Recompute.FULL] == tokens * width * float_bytes + generator_state


def test_boundary_bytes_are_those_of_the_hidden_state(profile):
    assert cost(profile, "embedding").output_bytes == 16 * 64 * 4
    assert cost(profile, "blocks.2", 2).output_bytes == 2 * 16 * 64 * 4


def test_flops_are_those_of_the_matrix_products(profile):
    assert cost(profile, "blocks.0").forward_flops == 2 * 16 * (64 * 256 * 2)
    assert cost(profile, "head", 2).forward_flops == 2 * 2 * 16 * 64 * 32


def test_the_pedigree_names_device_versions_and_time(profile):
    pedigree = profile.pedigree
    assert pedigree.device
    assert pedigree.versions["torch"] == torch.__version__
    assert pedigree.taken_at
    assert pedigree.duration_s > 0


def test_a_profile_is_a_document(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert ModelProfile.load(tmp_path / "profile.json").digest == profile.digest


def test_siblings_work_while_this_rank_measures(tiny_model_file):
    phases = []
    profile = profile_model(
        f"{tiny_model_file}:build",
        microbatches=(1,),
        sequence_length=16,
        num_busy_ranks=2,
        budget_s=0.2,
        device="cpu",
        progress=lambda phase, done, total: phases.append((phase, done, total)),
    )
    assert profile.pedigree.num_busy_ranks == 2
    assert ("busy ranks", 1, 1) in phases


def test_a_module_at_hand_is_profiled():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(InvalidArgument, match="no batch can be guessed for Sequential"):
        profile_model(model, microbatches=(1,), device="cpu", budget_s=0.1)


def test_a_parameter_outside_all_layers_is_refused_by_name():
    class Stray(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def stagewright_layers(self):
            return {"first": self.first, "second": self.second}

        def forward(self, inputs):
            return self.second(self.first(inputs) * self.scale)

    with pytest.raises(InvalidDocument, match="'scale' belongs to 0 layers"):
        profile_model(Stray(), microbatches=(1,), device="cpu", budget_s=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"microbatches": (0,)}, "microbatches must be positive"),
        ({"sequence_length": ()}, "sequence_length must be positive"),
        ({"num_busy_ranks": 0}, "num_busy_ranks 0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"cache_policy": "cold"}, "cache_policy 'cold'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_model_file, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        profile_model(f"{tiny_model_file}:build", **{"device": "cpu", **settings})


def test_a_configuration_that_does_not_fit_is_left_out_and_said(tiny_model_file, monkeypatch):
    from stagewright.profiler.model_bench import ModelBench

    warm_up = ModelBench.warm_up

    def refuse_large(self, configuration):
        if configuration.microbatch == 2:
            raise torch.OutOfMemoryError("out of memory")
        warm_up(self, configuration)

    monkeypatch.setattr(ModelBench, "warm_up", refuse_large)
    settings = {"sequence_length": 16, "budget_s": 0.1, "device": "cpu"}
    profile = profile_model(f"{tiny_model_file}:build", microbatches=(1, 2), **settings)
    assert {entry.microbatch for value in profile.classes.values() for entry in value.costs} == {1}
    assert "microbatch 2, sequence 16 does not fit the device and was not measured" in profile.pedigree.warnings
    with pytest.raises(InvalidArgument, match="no configuration fits the device"):
        profile_model(f"{tiny_model_file}:build", microbatches=(2,), **settings)


def test_a_configuration_whose_split_backward_does_not_fit_is_left_out_too(tiny_model_file, monkeypatch):
    from stagewright.profiler.model_bench import ModelBench

    measure = ModelBench.measure

    def refuse(self, configuration, kind):
        if configuration.microbatch == 2 and kind == "split":
            raise torch.OutOfMemoryError("out of memory")
        return measure(self, configuration, kind)

    monkeypatch.setattr(ModelBench, "measure", refuse)
    profile = profile_model(
        f"{tiny_model_file}:build", microbatches=(1, 2), sequence_length=16, budget_s=0.1, device="cpu"
    )
    assert {entry.microbatch for value in profile.classes.values() for entry in value.costs} == {1}
    assert "microbatch 2, sequence 16 does not fit the device and was not measured" in profile.pedigree.warnings


class Branches(nn.Module):
    """A stem whose output two branches take, and a join: a graph that is no chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.join = Join()

    def stagewright_layers(self):
        return {"stem": self.stem, "left": self.left, "right": self.right, "join": self.join}

    def stagewright_edges(self):
        return [("stem", "left"), ("stem", "right"), ("left", "join"), ("right", "join")]

    def forward(self, inputs):
        hidden = self.stem(inputs)
        return self.join(self.left(hidden), self.right(hidden))


class Join(nn.Module):
    def forward(self, left, right):
        return (left * right).square().mean()


def test_a_graph_is_profiled_with_its_edges(monkeypatch):
    monkeypatch.setattr(
        "stagewright.profiler.model_source.guessed_batch",
        lambda model, size, length: (torch.randn(size, 8), torch.zeros(1)),
    )
    profile = profile_model(Branches(), microbatches=(1,), sequence_length=1, device="cpu", budget_s=0.1)
    assert profile.edge_indices == ((0, 1), (0, 2), (1, 3), (2, 3))
    assert not profile.is_chain
    assert cost(profile, "stem").output_bytes == 8 * 4
    assert cost(profile, "left").forward_s > 0
    assert cost(profile, "join").input_grad_s + cost(profile, "join").weight_grad_s > 0


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"budget_s": float("nan")}, "budget"),
        ({"budget_s": float("inf")}, "budget"),
        ({"budget_s": -1.0}, "budget"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"dtype": "int8"}, "dtype"),
        ({"microbatches": (0,)}, "microbatches"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(tiny_model_file, setting, field):
    with pytest.raises(InvalidArgument) as raised:
        profile_model(f"{tiny_model_file}:build", device="cpu", **{"microbatches": (1,), **setting})
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(): raise ValueError('no weights')", "failed to build the model: ValueError: no weights"),
        (
            "def build(width): pass",
            "failed to build the model: TypeError: build() missing 1 required positional argument",
        ),
        ("def build(): return 3", "returned int, not a torch module"),
        (
            "import nothing_of_this_name",
            "cannot be loaded: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("def build(:", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_factory_that_fails_is_the_users_to_mend(tmp_path, text, message):
    path = tmp_path / "broken_model.py"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as raised:
        profile_model(f"{path}:build", device="cpu")
    assert message in raised.value.message
    assert raised.value.field == "model"


def test_a_model_that_cannot_run_a_layer_twice_has_no_recomputation(caplog):
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, hidden, seen):
            if id(self) in seen:
                raise ValueError("a layer ran twice")
            seen.add(id(self))
            return torch.relu(self.inner(hidden))

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList([Once(), Once()])
            self.head = nn.Linear(8, 10)

        def forward(self, tokens, targets):
            hidden, seen = self.token(tokens), set()
            for block in self.blocks:
                hidden = block(hidden, seen)
            return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    profile = profile_model(Caching(), microbatches=(1,), sequence_length=8, device="cpu", budget_s=0.0)
    assert all(set(entry.activation_bytes) == {"none"} for kind in profile.classes.values() for entry in kind.costs)
    assert "recomputation fails and is left out: ValueError: a layer ran twice" in caplog.text


def test_the_cache_policy_is_recorded(profile, tiny_model_file):
    settings = {"microbatches": (1,), "sequence_length": 16, "budget_s": 0.0, "device": "cpu"}
    flushed = profile_model(f"{tiny_model_file}:build", cache_policy="flushed", **settings)
    assert (profile.pedigree.cache_policy, flushed.pedigree.cache_policy) == ("hot", "flushed")


def test_the_profiles_layers_are_those_a_run_will_find(profile, tiny_model_file):
    from stagewright.modeling import load_object, split

    assert split(load_object(f"{tiny_model_file}:build")()).layer_digest == profile.layer_digest


def test_a_cache_does_not_take_a_models_bytes_for_those_of_one_with_a_shared_weight(tmp_path):
    """Between embedding and head that share a weight, a gradient waits; the same layers without have less workspace."""
    models = Path(__file__).parents[1] / "runtime" / "planned_models.py"
    numbers = {"microbatches": (1,), "sequence_length": 16, "device": "cpu", "budget_s": 0.0, "cache": tmp_path}
    tied, untied = (profile_model(f"{models}:{name}", **numbers).classes["Block"] for name in ("tied", "untied"))
    assert tied.costs[0].workspace_bytes - untied.costs[0].workspace_bytes == 4 * 64 * 256
