"""`stagewright schedule` as scripts see it: keys, numbers, exit codes, files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from stagewright.cli.main import run

KEYS = {
    "schedule",
    "num_ranks",
    "num_microbatches",
    "ideal_s",
    "makespan_s",
    "longest_span_s",
    "bubble_over_total",
    "bubble_over_ideal",
    "span_bubble_over_total",
    "peak_activations",
    "weight_versions",
    "num_messages",
    "bound_s",
}


@pytest.fixture
def call(capsys):
    def call(*arguments):
        code = run(["schedule", *(str(argument) for argument in arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def costs_file(tmp_path):
    def write(document):
        path = tmp_path / "costs.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def entries(count, **changes):
    return [{"forward_s": 1.0, "input_grad_s": 1.0, "weight_grad_s": 1.0} | changes for _ in range(count)]


def test_the_document_has_the_contracts_keys_and_the_papers_numbers(call):
    code, document = call("interleaved", "--ranks", 4, "--microbatches", 8)
    assert code == 0
    assert set(document) >= KEYS
    assert document["bubble_over_ideal"] == pytest.approx(3 / 16)
    assert document["bubble_over_total"] == pytest.approx(3 / 19)
    assert document["peak_activations"] == [5.5, 4.5, 3.5, 2.5]
    assert document["num_messages"] == 8 * 2 * 7
    assert document["ideal_s"] <= document["bound_s"] <= document["makespan_s"]


def test_the_bubbles_follow_from_ideal_and_makespan_when_stages_differ_too(call, costs_file):
    path = costs_file([{"forward_s": 1, "input_grad_s": 2, "weight_grad_s": 1.5}, *entries(1)])
    _, document = call("1f1b", "--ranks", 2, "--microbatches", 4, "--costs", path)
    assert document["bubble_over_total"] == pytest.approx(1 - document["ideal_s"] / document["makespan_s"])
    assert document["bubble_over_ideal"] == pytest.approx(document["makespan_s"] / document["ideal_s"] - 1)


def test_costs_are_one_ranks_share_which_chunks_divide(call, costs_file):
    options = ("interleaved", "--ranks", 2, "--microbatches", 4, "--chunks", 2)
    _, flags = call(*options, "--forward-s", 2, "--input-grad-s", 3, "--weight-grad-s", 1)
    path = costs_file(entries(4, forward_s=1.0, input_grad_s=1.5, weight_grad_s=0.5))
    _, file = call(*options, "--costs", path)
    assert {key: flags[key] for key in KEYS} == {key: file[key] for key in KEYS}


def test_the_number_of_entries_says_how_many_chunks(call, costs_file):
    _, document = call(
        "interleaved", "--ranks", 2, "--microbatches", 4, "--costs", costs_file(entries(8, forward_s=0.25))
    )
    assert document["num_messages"] == 4 * 2 * 7


def test_recomputation_and_activation_of_an_entry_count(call, costs_file):
    path = costs_file(entries(2, activation=0.25, recompute_s=1.0))
    _, document = call("gpipe", "--ranks", 2, "--microbatches", 4, "--costs", path)
    assert document["ideal_s"] == 16.0
    assert document["peak_activations"] == [1, 1]


def test_two_replicas_hold_the_weights_twice(call):
    _, document = call("gems", "--ranks", 4, "--microbatches", 8)
    assert document["weight_versions"] == [2, 2, 2, 2]
    assert document["peak_activations"] == [1, 1, 1, 1]


def test_auto_keeps_the_cap_and_beats_the_named_schedules_that_do(call):
    code, document = call("auto", "--ranks", 2, "--microbatches", 4, "--memory-cap", 2, "--effort", "low")
    assert code == 0
    assert set(document) >= KEYS
    assert max(document["peak_activations"]) <= 2
    assert document["bound_s"] <= document["makespan_s"] <= document["best_named"]["makespan_s"]


def test_auto_says_that_it_keeps_two_copies_and_what_one_takes(call, costs_file, capsys):
    path = costs_file([*entries(1, forward_s=2.0), *entries(3, forward_s=1.0)])
    options = ("auto", "--ranks", 4, "--microbatches", 4, "--costs", path, "--effort", "low")
    code, both = call(*options)
    assert code == 0
    assert both["num_copies"] == 2
    assert both["weight_versions"] == [2, 2, 2, 2]
    assert both["bound_s"] <= both["makespan_s"] < both["one_copy"]["makespan_s"]
    _, one = call(*options, "--copies", 1)
    assert one["num_copies"] == 1
    assert one["makespan_s"] == both["one_copy"]["makespan_s"] == one["one_copy"]["makespan_s"]
    assert run(["schedule", *map(str, options)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "each rank holds 2 copies of its weights and gradients" in printed
    assert "--copies 1" in printed


def test_operators_of_any_number_are_mapped_to_the_ranks(call, costs_file):
    path = costs_file([*entries(2, forward_s=2.0), *entries(3)])
    code, document = call(
        "auto", "--ranks", 2, "--microbatches", 2, "--costs", path, "--placement", "operators", "--effort", "low"
    )
    assert code == 0
    assert document["placement"] == "operators"
    assert document["stop"] == "optimal"
    assert document["ideal_s"] == pytest.approx(2 * 17.0 / 2)
    code, document = call("auto", "--ranks", 2, "--microbatches", 2, "--costs", path)
    assert code == 2
    assert "5 entries" in document["error"]["message"]


def test_auto_keeps_one_copy_for_torchs_csv_which_knows_no_other(call, tmp_path):
    code, document = call(
        "auto", "--ranks", 2, "--microbatches", 2, "--effort", "low", "--csv", tmp_path / "auto.csv", "--lowered"
    )
    assert code == 0
    assert document["num_copies"] == 1
    assert "SEND_F" in (tmp_path / "auto.csv").read_text()


def test_a_cap_that_a_named_schedule_exceeds_is_a_usage_error_with_both_numbers(call):
    code, document = call("1f1b", "--ranks", 4, "--microbatches", 8, "--memory-cap", 3)
    assert code == 2
    assert "4" in document["error"]["message"]
    assert "3" in document["error"]["message"]
    assert document["error"]["field"] == "memory_cap"


def test_a_cap_that_no_schedule_meets_is_infeasible_with_the_least_cap_that_works(call):
    code, document = call("auto", "--ranks", 4, "--microbatches", 8, "--memory-cap", 0.2, "--effort", "low")
    assert code == 3
    assert set(document) >= KEYS
    assert document["makespan_s"] is None
    assert "smallest cap that works is 1" in document["error"]["hint"]


def test_the_list_names_every_family_with_its_rule(call, capsys):
    code = run(["schedule", "list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert code == 0
    by_name = {row["name"]: row for row in rows}
    assert by_name["interleaved"]["default_chunks"] == 2
    assert by_name["gems"]["num_replicas"] == 2
    assert "dapple" in by_name["1f1b"]["aliases"]
    assert all(row["paper"] for row in rows)
    assert run(["schedule", "list"]) == 0
    assert "interleaved" in capsys.readouterr().out


def test_people_get_a_table_and_a_drawing(capsys):
    assert run(["schedule", "1f1b", "--ranks", "4", "--microbatches", "8"]) == 0
    printed = capsys.readouterr().out
    assert "bubble_over_total" in printed
    assert "rank  3 |" in printed


def test_files_are_written_beside_the_numbers(call, tmp_path):
    names = {"--svg": tmp_path / "s.svg", "--trace": tmp_path / "s.json", "--csv": tmp_path / "s.csv"}
    code, _ = call("1f1b", "--ranks", 2, "--microbatches", 2, *(part for pair in names.items() for part in pair))
    assert code == 0
    assert ElementTree.parse(names["--svg"]).getroot().tag.endswith("svg")
    assert json.loads(names["--trace"].read_text())["traceEvents"]
    assert names["--csv"].read_text() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    code, _ = call("1f1b", "--ranks", 2, "--microbatches", 1, "--csv", names["--csv"], "--lowered")
    assert names["--csv"].read_text().startswith("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n")


def test_the_same_command_prints_the_same_bytes(capsys):
    printed = []
    for _ in range(2):
        run(["schedule", "auto", "--ranks", "2", "--microbatches", "4", "--effort", "low", "--seed", "7", "--json"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


BAD_OPTIONS = [
    (("1f1b", "--ranks", 4), "microbatches"),
    (("1f1b", "--microbatches", 4), "ranks"),
    (("1f1b", "--ranks", 0, "--microbatches", 4), "ranks"),
    (("1f1b", "--ranks", 4, "--microbatches", -1), "microbatches"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--forward-s", "nan"), "forward_s"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--forward-s", 0), "forward_s"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--weight-grad-s", "inf"), "weight_grad_s"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--latency-s", -1), "latency_s"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--memory-cap", 0), "memory_cap"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--memory-cap", "nan"), "memory_cap"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--placement", "zigzag"), "placement"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--placement", "v"), "placement"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--chunks", 0), "chunks"),
    (("interleaved", "--ranks", 4, "--microbatches", 7), "num_microbatches"),
    (("auto", "--ranks", 4, "--microbatches", 4, "--copies", 3), "copies"),
    (("gems", "--ranks", 4, "--microbatches", 4, "--copies", 1), "copies"),
    (("auto", "--ranks", 4, "--microbatches", 4, "--effort", "endless"), "effort"),
    (("auto", "--ranks", 4, "--microbatches", 4, "--deadline", 0), "deadline"),
    (("auto", "--ranks", 4, "--microbatches", 4, "--slices", 2), "slices"),
    (("nonesuch", "--ranks", 4, "--microbatches", 4), "schedule"),
    (("1f1b", "--ranks", 4, "--microbatches", 4, "--set", "x"), "set"),
]


@pytest.mark.parametrize(("options", "field"), BAD_OPTIONS)
def test_bad_options_name_their_field(call, options, field):
    code, document = call(*options)
    assert code == 2
    assert document["error"]["field"] == field


BAD_FILES = [
    ("[", None),
    ("{}", "costs"),
    ("[]", "costs"),
    ("[3]", "costs[0]"),
    (json.dumps(entries(2, surprise=1)), "costs[0].surprise"),
    (json.dumps([{"forward_s": 1.0}]), "costs[0].input_grad_s"),
    (json.dumps(entries(2, forward_s=0)), "costs.forward_s[0]"),
    (json.dumps(entries(2, forward_s=-2)), "costs.forward_s[0]"),
    (json.dumps(entries(2, activation=-1)), "costs.activation[0]"),
    (json.dumps(entries(2, forward_s="1")), "costs[0].forward_s"),
    (json.dumps(entries(2, forward_s=True)), "costs[0].forward_s"),
    (json.dumps(entries(2)).replace("1.0", "NaN"), None),
    (json.dumps(entries(3)), "costs"),
    (json.dumps(entries(4)), "num_chunks"),
]


@pytest.mark.parametrize(("text", "field"), BAD_FILES)
def test_bad_cost_files_name_the_entry(call, costs_file, text, field):
    code, document = call("1f1b", "--ranks", 2, "--microbatches", 4, "--costs", costs_file(text))
    assert code == 2
    assert document["error"]["field"] == field
    assert document["error"]["message"]


def test_costs_exclude_the_cost_options(call, costs_file):
    code, document = call(
        "1f1b", "--ranks", 2, "--microbatches", 4, "--costs", costs_file(entries(2)), "--forward-s", 2
    )
    assert code == 2
    assert "--forward-s" in document["error"]["message"]


def test_a_schedule_that_torch_cannot_express_has_its_own_exit_code_and_writes_nothing(call, tmp_path):
    code, document = call(
        "gems", "--ranks", 2, "--microbatches", 4, "--csv", tmp_path / "g.csv", "--svg", tmp_path / "g.svg"
    )
    assert code == 5
    assert document["error"]["kind"] == "not-expressible"
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_refused(call, tmp_path):
    code, document = call("1f1b", "--ranks", 2, "--microbatches", 4, "--svg", tmp_path / "none" / "x.svg")
    assert code == 2
    assert "cannot be written" in document["error"]["message"]


def registered():
    from stagewright.planner.schedules.registry import families

    return [row.name for row in families()]


@pytest.mark.parametrize("name", registered())
def test_every_registered_schedule_prints_its_document(call, name):
    code, document = call(name, "--ranks", 4, "--microbatches", 8)
    assert code == 0
    assert (document["num_ranks"], document["num_microbatches"]) == (4, 8)
    assert len(document["peak_activations"]) == len(document["weight_versions"]) == 4
    assert 0 < document["ideal_s"] <= document["longest_span_s"] <= document["makespan_s"]
    assert document["bound_s"] <= document["makespan_s"]


def test_weights_of_asynchronous_schedules_count_versions_and_replicas(call):
    versions = {
        name: call(name, "--ranks", 4, "--microbatches", 8)[1]["weight_versions"]
        for name in ("pipedream", "2bw", "wpipe", "ampnet", "avgpipe", "chimera")
    }
    assert versions == {
        "pipedream": [4, 3, 2, 1],
        "2bw": [2] * 4,
        "wpipe": [1.5] * 4,
        "ampnet": [1] * 4,
        "avgpipe": [2] * 4,
        "chimera": [2] * 4,
    }


def test_peer_swaps_level_the_peaks(call):
    _, document = call("bpipe", "--ranks", 8, "--microbatches", 16)
    assert max(document["peak_activations"]) == 5
