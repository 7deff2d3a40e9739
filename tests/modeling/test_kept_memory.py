"""Claims about freed memory: it is taken again without a page fault, in the main thread and in others."""

import platform
import resource
import threading

import pytest
import torch

from stagewright.modeling.kept_memory import allocator_name, keep_freed_memory

# More than glibc maps anew each time it is asked, and less than a thread's heap.
BLOCK_BYTES = 33 * 2**20
WARM_UP_ROUNDS, ROUNDS = 16, 5

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")


def faults_of(found: list[int]) -> None:
    """Allocate, touch and free a block, until the heap's small lists are full and it has settled; then count page faults."""
    before = 0
    for turn in range(WARM_UP_ROUNDS + ROUNDS):
        if turn == WARM_UP_ROUNDS:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(BLOCK_BYTES, dtype=torch.uint8).fill_(1)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@glibc
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_freed_block_is_taken_again_without_page_faults(in_thread: bool) -> None:
    keep_freed_memory()
    found: list[int] = []
    if in_thread:
        thread = threading.Thread(target=faults_of, args=(found,))
        thread.start()
        thread.join()
    else:
        faults_of(found)
    pages = ROUNDS * BLOCK_BYTES // resource.getpagesize()
    assert found[0] < pages / 100
    assert allocator_name() == "glibc, freed memory kept"
