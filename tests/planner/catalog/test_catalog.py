"""Names, shorthand and files: what commands take as a cluster or a model."""

import json

import pytest

from stagewright.planner.catalog import (
    cluster_entries,
    device_entries,
    device_entry,
    resolve_cluster,
    resolve_model,
)
from stagewright.planner.catalog.lint import lint_cluster
from stagewright.planner.documents import Cluster
from stagewright.planner.errors import InvalidArgument, InvalidDocument

TERA = 1e12


def test_there_are_more_than_twenty_devices_with_their_sources():
    entries = device_entries()
    assert len(entries) >= 20
    names = [name for entry in entries for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names), "a name stands for one device"
    for entry in entries:
        assert entry.device.reference, entry.name
    for name in (
        "v100-sxm-32g",
        "a100-sxm-80g",
        "h100-sxm",
        "h200-sxm",
        "b200-sxm",
        "gb200",
        "mi250x-gcd",
        "mi300x",
        "t4",
        "l4",
        "a10",
        "rtx-4090",
    ):
        assert device_entry(name).name == name


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("v100-sxm-32g", "fp16", 125),
        ("a100-sxm-80g", "bf16", 312),
        ("h100-sxm", "bf16", 989.4),
        ("h100-sxm", "fp8", 1978.9),
        ("b200-sxm", "bf16", 2250),
        ("mi300x", "bf16", 1307.4),
        ("l4", "bf16", 121),
        ("rtx-4090", "bf16", 165.2),
        ("t4", "fp16", 65),
    ],
)
def test_rates_are_dense_and_not_those_with_sparsity(name, dtype, teraflops):
    assert device_entry(name).device.flops[dtype] == pytest.approx(teraflops * TERA)


def test_narrower_types_are_never_slower():
    for entry in device_entries():
        flops = entry.device.flops
        order = [flops[dtype] for dtype in ("fp32", "bf16", "fp8", "fp4") if dtype in flops]
        assert order == sorted(order), entry.name
        for curve in (
            entry.device.matmul_efficiency,
            entry.device.memory_efficiency,
            entry.device.attention_efficiency,
        ):
            assert [point.size for point in curve] == sorted(point.size for point in curve)
            if entry.device.kind != "cpu":  # small arrays of a CPU lie in its caches
                assert [point.share for point in curve] == sorted(point.share for point in curve)


def test_shorthand_makes_nodes_and_two_link_levels():
    cluster = resolve_cluster("H100-SXM:8x16")
    group = cluster.groups[0]
    assert (cluster.num_devices, group.num_nodes, group.devices_per_node) == (128, 16, 8)
    assert [level.num_devices for level in group.links] == [8, 128]
    assert group.links[0].bytes_per_s > group.links[1].bytes_per_s
    assert resolve_cluster("h100:8x16").groups == cluster.groups
    assert [level.num_devices for level in resolve_cluster("t4:1x4").groups[0].links] == [4]
    assert resolve_cluster("t4:1x1").num_devices == 1


def test_a_mixed_cluster_is_joined_by_its_slower_network():
    cluster = resolve_cluster("a100-sxm-80g:8x4+v100-sxm-32g:8x2")
    assert [group.num_devices for group in cluster.groups] == [32, 16]
    assert cluster.between_groups is not None
    assert cluster.between_groups.bytes_per_s == device_entry("v100-sxm-32g").network.bytes_per_s
    twice = resolve_cluster("a100:8x1+a100:4x2")
    assert [group.name for group in twice.groups] == ["a100-sxm-80g", "a100-sxm-80g-2"]


def test_a_catalogue_name_takes_a_number_of_nodes():
    assert resolve_cluster("dgx-h100").num_devices == 8
    assert resolve_cluster("dgx-h100:16").num_devices == 128
    assert resolve_cluster("selene").num_devices == 4480
    assert resolve_cluster("mixed-a100-v100").is_mixed


@pytest.mark.parametrize("entry", cluster_entries(), ids=lambda entry: entry.name)
def test_every_cluster_of_the_catalogue_is_valid_and_plausible(entry):
    cluster = entry.cluster()
    assert Cluster.from_object(cluster.model_dump(mode="json")) == cluster
    assert lint_cluster(cluster) == []
    assert entry.reference


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100-sxm-80g:8x0", "0 nodes"),
        ("a100-sxm-80g:0x8", "0 devices per node"),
        ("a100-sxm-80g:-8x4", "-8 devices per node"),
        ("dgx-h100:0", "0 nodes"),
        ("h100-sxm", "a cluster needs its size"),
        ("", "empty"),
        ("h100-sxm:8x2+", "not DEVICE:PER_NODExNODES"),
        ("h100-sxm:8x9999999", "at most"),
        ("nowhere/cluster.json", "cannot be read"),
    ],
)
def test_a_bad_cluster_is_refused_with_the_way_out(text, message):
    with pytest.raises((InvalidArgument, InvalidDocument), match=message):
        resolve_cluster(text)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InvalidArgument) as device:
        resolve_cluster("a100-smx-80g:8x4")
    assert "a100-sxm-80g" in device.value.hint
    with pytest.raises(InvalidArgument) as cluster:
        resolve_cluster("dgx-h10")
    assert "dgx-h100" in cluster.value.hint
    with pytest.raises(InvalidArgument) as model:
        resolve_model("lama3-8b")
    assert "llama3-8b" in model.value.hint


def test_models_come_from_names_configs_folders_and_profiles(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    by_path, by_folder = resolve_model(str(folder / "config.json")), resolve_model(str(folder))
    assert by_path == by_folder
    assert by_path.name == "tiny-llama"
    by_path.save(tmp_path / "profile.json")
    assert resolve_model(str(tmp_path / "profile.json")) == by_path
    assert resolve_model(config).num_parameters == by_path.num_parameters
    assert resolve_model(" GPT2 ").name == "gpt2"


def test_files_that_are_neither_are_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidDocument, match="neither a profile"):
        resolve_model(str(tmp_path / "other.json"))
    (tmp_path / "cut.json").write_text('{"model_type": "lla')
    with pytest.raises(InvalidDocument, match="not JSON"):
        resolve_model(str(tmp_path / "cut.json"))
    with pytest.raises(InvalidDocument, match="cannot be read"):
        resolve_model(str(tmp_path / "none.json"))
    with pytest.raises(InvalidArgument, match="the model is empty"):
        resolve_model("  ")


def test_mistaken_units_are_reported():
    cluster = resolve_cluster("a100-sxm-80g:8x2")
    group = cluster.groups[0]
    slow = group.links[0].model_copy(update={"bytes_per_s": 300.0})
    small = group.device.model_copy(update={"memory_bytes": 80.0})
    wrong = cluster.model_copy(
        update={"groups": (group.model_copy(update={"links": (slow, group.links[1]), "device": small}),)}
    )
    found = lint_cluster(wrong)
    assert any("links[0].bytes_per_s: 300 bytes per second" in line for line in found)
    assert any("memory_bytes: 80 bytes" in line for line in found)
    assert any("faster than the level inside it" in line for line in found)
