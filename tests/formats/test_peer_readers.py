"""Readers of other planners' profiles: sums, round trips, unit checks, and errors with file, line and field."""

from __future__ import annotations

import json

import pytest

from stagewright.formats.aceso import (
    COLUMNS,
    cluster_from_aceso,
    operators_text,
    parse_operators,
    profile_from_aceso,
    read_aceso_folder,
    repeated_operators,
)
from stagewright.formats.dnn_partitioning import (
    cluster_from_problem,
    profile_from_problem,
    read_partition_problem,
)
from stagewright.formats.galvatron_profile import (
    cluster_from_galvatron,
    computation_text,
    memory_text,
    profile_from_galvatron,
    read_galvatron_profile,
)
from stagewright.formats.pipedream_graph import graph_text, parse_graph, profile_from_graph
from stagewright.formats.piper import cluster_from_piper, profile_from_piper, read_piper_problem
from stagewright.planner.documents import Recompute
from stagewright.planner.errors import InvalidDocument

GRAPH = """\
node1 -- Input0 -- forward_compute_time=0.000, backward_compute_time=0.000, activation_size=1000000.000, parameter_size=0.000
node2 -- Conv2d(3, 64) -- forward_compute_time=2.000, backward_compute_time=4.000, activation_size=8000000.000, parameter_size=4000.000
node3 -- LSTM(8, 8) -- forward_compute_time=1.000, backward_compute_time=2.000, activation_size=[6000.0; 2000.0], parameter_size=0.000
\tnode1 -- node2
\tnode2 -- node3
"""


def partition_object(**changes: object) -> dict[str, object]:
    node = {"supportedOnFpga": 1, "cpuLatency": 20.0, "fpgaLatency": 2.0, "size": 1e6}
    return {
        "maxSizePerFPGA": 16e9,
        "maxFPGAs": 2,
        "maxCPUs": 1,
        "nodes": [
            {"name": "a", "id": 1, "isBackwardNode": 0, "colorClass": 1, **node},
            {"name": "b", "id": 2, "isBackwardNode": 0, "colorClass": 2, **node},
            {"name": "bgrad", "id": 3, "isBackwardNode": 1, "colorClass": 2, **node},
            {"name": "agrad", "id": 4, "isBackwardNode": 1, "colorClass": 1, **node},
        ],
        "edges": [
            {"sourceId": 1, "destId": 2, "cost": 1.0, "size": 2e6},
            {"sourceId": 2, "destId": 3, "cost": 1.0, "size": 2e6},
            {"sourceId": 3, "destId": 4, "cost": 1.0, "size": 2e6},
        ],
        **changes,
    }


def piper_object() -> dict[str, object]:
    def entry(kind: str, seconds: float) -> dict[str, object]:
        return {
            "id": kind,
            "timePerSample": seconds,
            "parameterSize": 400.0,
            "memoryUsageA": 1e6 if kind == "vanilla" else 1e4,
            "memoryUsageB": 800.0,
            "syncTimeFw": {},
            "syncTimeBw": {"1": 0.0},
        }

    nodes = [
        {
            "id": i,
            "name": "layer",
            "TMPCs": {str(t): [entry("vanilla", 3e-3 / t), entry("activation recomp", 4e-3 / t)] for t in (1, 2)},
        }
        for i in range(2)
    ]
    edges = [{"sourceId": 0, "destId": 1, "communicationCost": 4096.0}]
    return {
        "maxDevices": 4,
        "maxMemoryPerDevice": 8e9,
        "bandwidth": 25e9,
        "mbsInBatch": 16,
        "nodes": nodes,
        "edges": edges,
    }


def write(tmp_path, value) -> str:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_a_graph_file_is_read_and_written_back_to_the_letter():
    assert graph_text(parse_graph(GRAPH)).strip() == GRAPH.strip()


def test_a_graph_becomes_layers_with_its_sums():
    profile = profile_from_graph(parse_graph(GRAPH), name="tiny", microbatch=64)
    costs = [profile.classes[name].costs[0] for name in profile.layer_classes]
    assert sum(cost.forward_s for cost in costs) == pytest.approx(3e-3)
    assert sum(cost.input_grad_s + cost.weight_grad_s for cost in costs) == pytest.approx(6e-3)
    assert profile.num_parameters == 1000
    assert costs[2].output_bytes == 8000


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("backward_compute_time=4.000", "backward_compute_time=fast", "graph.txt:2: backward_compute_time is 'fast'"),
        (", parameter_size=4000.000", "", "graph.txt:2: parameter_size is missing"),
        ("forward_compute_time=1.000", "forward_compute_time=-1", "graph.txt:3: forward_compute_time is -1.0"),
        ("\tnode2 -- node3", "\tnode2 -- node9", "node9, which is no node"),
        ("\tnode2 -- node3", "\tnode2 -- node3\n\tnode3 -- node1", "cycle"),
        ("node3 -- LSTM(8, 8) -- forward", "node3 -- LSTM(8, 8) -- fo", "graph.txt:3: neither a node nor an edge"),
    ],
)
def test_a_bad_graph_file_is_refused_with_line_and_field(old, new, words):
    with pytest.raises(InvalidDocument) as caught:
        parse_graph(GRAPH.replace(old, new))
    assert words in caught.value.message


def test_graph_times_in_microseconds_are_reported():
    text = GRAPH.replace("forward_compute_time=2.000", "forward_compute_time=9000000000.000")
    assert "milliseconds" in profile_from_graph(parse_graph(text), name="odd", microbatch=1).pedigree.warnings[0]


def test_forward_and_backward_nodes_of_one_colour_become_one_layer(tmp_path):
    problem = read_partition_problem(write(tmp_path, partition_object()))
    profile = profile_from_problem(problem, name="two")
    assert profile.layer_names == ("a", "b")
    cost = profile.classes["a"].costs[0]
    assert (cost.forward_s, cost.input_grad_s + cost.weight_grad_s) == (2e-3, 2e-3)
    assert problem.to_json()["nodes"] == partition_object()["nodes"]
    assert cluster_from_problem(problem, name="c", bytes_per_s=1e9).num_devices == 3


def test_communication_a_thousand_times_too_small_is_reported(tmp_path):
    believed = profile_from_problem(read_partition_problem(write(tmp_path, partition_object())), name="ok")
    assert believed.pedigree.warnings == ()
    edges = [{**edge, "cost": edge["cost"] / 1000} for edge in partition_object()["edges"]]
    doubted = profile_from_problem(read_partition_problem(write(tmp_path, partition_object(edges=edges))), name="odd")
    assert "2000 times too small" in doubted.pedigree.warnings[0]


def test_an_edge_to_nowhere_is_refused_with_its_index(tmp_path):
    with pytest.raises(InvalidDocument, match=r"edges\[0\] names node 99"):
        read_partition_problem(write(tmp_path, partition_object(edges=[{"sourceId": 1, "destId": 99, "cost": 1.0}])))


def test_a_colour_cycle_is_refused(tmp_path):
    edges = [{"sourceId": 1, "destId": 2, "cost": 1.0}, {"sourceId": 2, "destId": 1, "cost": 1.0}]
    problem = read_partition_problem(write(tmp_path, partition_object(edges=edges)))
    with pytest.raises(InvalidDocument, match="cycle"):
        profile_from_problem(problem, name="cyclic")


def test_piper_configurations_become_tensor_degrees_and_recomputation(tmp_path):
    problem = read_piper_problem(write(tmp_path, piper_object()))
    profile = profile_from_piper(problem, name="piper")
    first, second = profile.classes["0:layer"].costs
    assert (first.tensor_degree, second.tensor_degree) == (1, 2)
    assert first.forward_s + first.input_grad_s + first.weight_grad_s == pytest.approx(3e-3)
    assert first.recompute_s["full"] == pytest.approx(1e-3)
    assert profile.num_parameters == 200
    assert read_piper_problem(write(tmp_path, problem.to_json())) == problem
    assert cluster_from_piper(problem, name="c").groups[0].links[0].bytes_per_s == 25e9


def test_a_truncated_piper_file_is_refused_with_the_path(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(piper_object())[:-40])
    with pytest.raises(InvalidDocument, match=r"cut\.json: not JSON"):
        read_piper_problem(str(path))


@pytest.mark.parametrize(
    ("name", "forward_ms", "backward_ms"), [("vgg16", 251.87, 438.63), ("resnet50", 201.45, 260.93)]
)
def test_published_graphs_have_the_published_sums(peer_profiles, name, forward_ms, backward_ms):
    text = (peer_profiles / "pipedream" / f"{name}.graph.txt").read_text()
    graph = parse_graph(text, source=name)
    assert sum(node.forward_ms for node in graph.nodes) == pytest.approx(forward_ms, abs=0.006)
    assert sum(node.backward_ms for node in graph.nodes) == pytest.approx(backward_ms, abs=0.006)
    assert parse_graph(graph_text(graph)) == graph
    assert graph_text(graph).strip() == text.strip()


ACESO = (
    ",".join(COLUMNS)
    + "\n"
    + """\
encoder-embedding,10.000,20.000,0.008,8.000,100.000,4.000,2.000,6.000
enc-qkv,40.000,80.000,8.000,24.000,12.000,12.000,4.000,20.000
enc-mlp,60.000,120.000,24.000,8.000,16.000,8.000,0.000,40.000
post-process,30.000,30.000,8.000,0.000,0.000,8.000,1.000,0.000
"""
)


@pytest.fixture
def aceso_folder(tmp_path):
    (tmp_path / "tiny_mbs1_tp1_algo0.csv").write_text(ACESO)
    (tmp_path / "tiny_mbs1_tp1_algo1.csv").write_text(ACESO.replace("60.000,120.000", "50.000,100.000"))
    (tmp_path / "prim_tiny_all_gather_2gpus.csv").write_text("data_size(MB),time(ms)\n8,2.000\n4,1.000\n")
    (tmp_path / "p2p_intra_node.csv").write_text("1,2,4\n5.0,8.0,10.0\n")
    return tmp_path


def test_aceso_operators_are_written_back_to_the_letter():
    assert operators_text(parse_operators(ACESO, source="a.csv")) == ACESO


def test_aceso_blocks_repeat_and_the_faster_algorithm_is_taken(aceso_folder):
    folder = read_aceso_folder(aceso_folder, "tiny")
    profile = profile_from_aceso(folder, num_blocks=3, sequence_length=128)
    assert profile.layer_names[:4] == ("encoder-embedding", "enc.0.enc-qkv", "enc.0.enc-mlp", "enc.1.enc-qkv")
    assert profile.num_layers == 8
    assert profile.classes["enc-mlp"].costs[0].forward_s == pytest.approx(50e-6)
    link = cluster_from_aceso(folder, name="c", num_devices=2, memory_bytes=1e9).groups[0].links[0]
    assert link.bytes_per_s == 10e9
    assert [segment.bytes_per_s for segment in link.collectives["all-gather/2"]] == pytest.approx(
        [4 * 2**20 / 1e-3] * 2
    )


def test_encoder_and_decoder_blocks_repeat_apart():
    names = [
        "encoder-embedding",
        "enc-a",
        "enc-final-layernorm",
        "decoder-embedding",
        "dec-a",
        "dec-b",
        "t5-post-process",
    ]
    assert [layer for layer, _ in repeated_operators(names, 2)][:5] == [
        "encoder-embedding",
        "enc.0.enc-a",
        "enc.1.enc-a",
        "enc-final-layernorm",
        "decoder-embedding",
    ]
    assert len(repeated_operators(names, 2)) == 4 + 2 + 4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("40.000,80.000", "40.000,soon", "a.csv:3: backward-compute is 'soon'"),
        ("enc-mlp,60.000,", "enc-mlp,", "a.csv:4: 8 values, 9 columns"),
        ("op_name", "operator", "a.csv:1: columns are operator"),
    ],
)
def test_a_bad_aceso_table_is_refused_with_line_and_column(old, new, words):
    with pytest.raises(InvalidDocument) as caught:
        parse_operators(ACESO.replace(old, new), source="a.csv")
    assert words in caught.value.message


def test_an_aceso_folder_without_the_model_names_those_it_has(aceso_folder):
    with pytest.raises(InvalidDocument) as caught:
        read_aceso_folder(aceso_folder, "huge")
    assert "tiny" in (caught.value.hint or "")


def galvatron_files(tmp_path) -> tuple[str, str]:
    computation = {"layernum[2]_bsz1_seq64": 9.0, "layertype_0_bsz1_seq64": 3.0, "layertype_other_bsz1_seq64": 2.0}
    memory = {
        "layertype_0_sp": {
            "64": {"parameter_size": 40.0, "tp_activation_per_bsz_dict": {"1": 8.0, "2": 4.0, "checkpoint": 1.0}}
        },
        "other_memory_pp_off_sp": {"64": {"model_states": {"1": 160.0, "2": 80.0}, "activation": {"1": 6.0, "2": 3.0}}},
    }
    paths = tmp_path / "computation.json", tmp_path / "memory.json"
    for path, value in zip(paths, (computation, memory), strict=True):
        path.write_text(json.dumps(value))
    return str(paths[0]), str(paths[1])


def test_galvatron_files_become_blocks_and_a_head(tmp_path):
    profile = profile_from_galvatron(
        read_galvatron_profile(*galvatron_files(tmp_path)), name="g", num_layers=4, hidden_size=32
    )
    block = {cost.tensor_degree: cost for cost in profile.classes["block"].costs}
    assert block[1].forward_s == pytest.approx(3e-3)
    assert block[1].input_grad_s + block[1].weight_grad_s == pytest.approx(6e-3)
    assert block[2].activation_bytes["none"] == 4 * 2**20
    assert profile.num_parameters == 4 * 10 * 2**20 + 10 * 2**20


def _galvatron_round_trip(tmp_path, computation, memory) -> None:
    read = read_galvatron_profile(computation, memory)
    (tmp_path / "computation.json").write_text(computation_text(read))
    (tmp_path / "memory.json").write_text(memory_text(read))
    assert read_galvatron_profile(tmp_path / "computation.json", tmp_path / "memory.json") == read


def test_galvatron_files_round_trip(tmp_path):
    _galvatron_round_trip(tmp_path, *galvatron_files(tmp_path))


def test_published_galvatron_files_round_trip(tmp_path, peer_profiles):
    folder = peer_profiles / "galvatron"
    files = (folder / f"{kind}_profiling_bf16_llama2-7b_all.json" for kind in ("computation", "memory"))
    _galvatron_round_trip(tmp_path, *files)


def test_galvatron_hardware_files_become_a_measured_node(tmp_path):
    for name, value in {
        "a": {"allreduce_size_2_consec_1": 150.0},
        "p": {"pp_size_2": 160.0},
        "o": {"overlap_coe": 1.1},
    }.items():
        (tmp_path / name).write_text(json.dumps(value))
    cluster = cluster_from_galvatron(
        name="node",
        devices_per_node=2,
        memory_bytes=1e9,
        allreduce=tmp_path / "a",
        point_to_point=tmp_path / "p",
        overlap=tmp_path / "o",
    )
    assert cluster.groups[0].links[0].bytes_per_s == 160e9
    assert cluster.groups[0].links[0].overlap_slowdown == 1.1


def test_galvatron_times_of_two_sequences_are_refused(tmp_path):
    computation, memory = galvatron_files(tmp_path)
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({"layertype_0_bsz1_seq64": 3.0, "layertype_other_bsz1_seq128": 2.0}))
    with pytest.raises(InvalidDocument, match=r"mixes sequence lengths \[64, 128\]"):
        read_galvatron_profile(mixed, memory)
    assert computation


def test_published_aceso_tables_round_trip(peer_profiles):
    tables = sorted((peer_profiles / "aceso").glob("*algo*.csv"))
    assert len(tables) > 50
    for table in tables:
        assert operators_text(parse_operators(table.read_text(), source=table.name)) == table.read_text()


BLOCK = f"""{",".join(COLUMNS)}
enc-1st-layernorm,10.000,20.000,8.000,8.000,0.000,8.000,0.000,0.000
enc-qkv,50.000,100.000,8.000,24.000,6.000,24.000,0.000,0.000
enc-score,20.000,40.000,24.000,256.000,0.000,256.000,0.000,0.000
enc-dropout,30.000,60.000,256.000,256.000,0.000,256.000,0.000,512.000
enc-context,90.000,180.000,256.000,8.000,0.000,8.000,0.000,0.000
enc-dense,25.000,50.000,8.000,8.000,2.000,8.000,0.000,0.000
enc-2nd-layernorm,10.000,20.000,8.000,8.000,0.000,8.000,0.000,0.000
enc-mlp,80.000,160.000,8.000,8.000,8.000,8.000,0.000,0.000
head,70.000,140.000,8.000,0.000,4.000,16.000,0.000,0.000
"""


@pytest.mark.parametrize(("grain", "layers"), [("block", 4), ("sublayer", 7), ("operator", 25)])
def test_aceso_operators_add_up_to_layers_of_each_grain(tmp_path, grain, layers):
    (tmp_path / "tiny_mbs1_tp1_algo0.csv").write_text(BLOCK)
    (tmp_path / "tiny_mbs1_tp1_algo1.csv").write_text(BLOCK.replace("50.000,100.000", "40.000,200.000"))
    profile = profile_from_aceso(read_aceso_folder(tmp_path, "tiny"), num_blocks=3, sequence_length=128, grain=grain)
    assert profile.num_layers == layers
    costs = [profile.classes[name].costs[0] for name in profile.layer_classes]
    assert sum(cost.forward_s for cost in costs) == pytest.approx((3 * 315 + 70) * 1e-6)
    assert sum(cost.activation_bytes[Recompute.NONE] for cost in costs) == (3 * 576 + 16) * 2**20


def test_selective_recomputation_drops_the_attention_core_but_not_its_cheap_product(tmp_path):
    (tmp_path / "tiny_mbs1_tp1_algo0.csv").write_text(BLOCK)
    profile = profile_from_aceso(read_aceso_folder(tmp_path, "tiny"), num_blocks=3, sequence_length=128, grain="block")
    (block,) = profile.classes["enc-1st-layernorm"].costs
    assert block.recompute_s[Recompute.SELECTIVE] == pytest.approx((20 + 30) * 1e-6)
    saved = block.activation_bytes[Recompute.NONE] - block.activation_bytes[Recompute.SELECTIVE]
    assert saved == (256 + 256 - 24) * 2**20
    assert block.activation_bytes[Recompute.FULL] == 8 * 2**20
    assert block.recompute_s[Recompute.FULL] == block.forward_s == pytest.approx(315e-6)
