"""Reading nccl-tests output as its programs print it."""

import pytest

from stagewright.planner.documents import Source
from stagewright.planner.errors import InvalidDocument
from stagewright.profiler.nccl_tests import apply_nccl_tests, parse_nccl_tests, read_nccl_tests
from stagewright.testing import cluster_factory

HEADER = """\
# nThread 1 nGpus 2 minBytes 1048576 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#  Rank  0 Group  0 Pid   1 on      node device  0 [0x0a] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid   1 on      node device  1 [0x18] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
ROWS = """\
           0             0     float     sum      -1     0.14    0.00    0.00      0     0.13    0.00    0.00      0
     1048576        262144     float     sum      -1    24.31   43.13   43.13      0    23.66   44.32   44.32      0
     4194304       1048576     float     sum      -1    48.52   86.44   86.44      0    47.90   87.56   87.56      0
    16777216       4194304     float     sum      -1    142.9  117.40  117.40      0    142.1  118.07  118.07      0
  1073741824     268435456     float     sum      -1     9071  118.37  118.37      0     9068  118.41  118.41    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 84.05
"""


def test_sizes_and_out_of_place_times_are_read_in_si_units():
    test = parse_nccl_tests(HEADER + ROWS, source="all_reduce_perf.txt")
    assert (test.operation, test.num_ranks) == ("all-reduce", 2)
    assert test.sizes_bytes == (2.0**20, 2.0**22, 2.0**24, 2.0**30)
    assert test.seconds == pytest.approx((24.31e-6, 48.52e-6, 142.9e-6, 9071e-6))


def test_the_measured_lines_replace_those_of_the_level_that_joins_the_ranks(tmp_path):
    path = tmp_path / "all_reduce_perf.txt"
    path.write_text(HEADER + ROWS)
    cluster = apply_nccl_tests(cluster_factory(8, 2), [read_nccl_tests(path)])
    inside, between = cluster.groups[0].links
    assert inside.source is Source.MEASURED
    assert set(inside.collectives) == {"all-reduce"}
    last = inside.collectives["all-reduce"][-1]
    assert last.latency_s + 2**30 / last.bytes_per_s == pytest.approx(9071e-6, rel=0.2)
    assert between.collectives == {}


def test_send_receive_sets_the_line_between_two_devices():
    test = parse_nccl_tests(HEADER + ROWS, source="sendrecv_perf")
    level = apply_nccl_tests(cluster_factory(8), [test]).groups[0].links[0]
    assert level.segments
    assert level.bytes_per_s == level.segments[-1].bytes_per_s


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        (HEADER + ROWS, "log.txt", "the operation is not named"),
        (HEADER, "all_reduce_perf", "2 ranks and 0 rows"),
        ("hello", "all_gather_perf", "0 ranks and 0 rows"),
    ],
)
def test_what_is_no_output_is_refused(text, source, message):
    with pytest.raises(InvalidDocument, match=message):
        parse_nccl_tests(text, source=source)


def test_more_ranks_than_any_level_joins_are_refused():
    test = parse_nccl_tests(HEADER + ROWS, source="all_reduce_perf")
    with pytest.raises(InvalidDocument, match="the test had 2 ranks, the largest level of mocked joins 1"):
        apply_nccl_tests(cluster_factory(1), [test])
