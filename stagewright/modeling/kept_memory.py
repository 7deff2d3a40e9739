"""Keeping freed memory in the process: what a step frees, the next one takes again without asking the system.

glibc gives blocks of more than 32 MiB back to the system when they are freed, and the top of its heap too, so that every
step of a training pays for the same pages again: each is mapped, zeroed and found by a page fault when it is first touched
(12,000 to 24,000 faults a step of the example GPT, 4 to 6 % of its time). Here every block comes from a heap that is never
trimmed, which needs little more memory than the peak did and settles after about ten allocations of a size. A profile and a
run both do this, so that their seconds mean the same.

Not kept: blocks of 64 MiB and more that threads other than the main one allocate; glibc maps them each time.
"""

from __future__ import annotations

import ctypes
import platform

# The numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_HEAP_BYTES = 2**26  # of a thread's heap; a pad of as much keeps an empty one from being given back


def keep_freed_memory() -> None:
    """Let this process keep what it frees from now on, where its allocator is glibc's."""
    if _is_glibc():
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _HEAP_BYTES)):
            mallopt(name, value)


def allocator_name() -> str:
    """Return in words what `keep_freed_memory` makes of this process's allocator."""
    return "glibc, freed memory kept" if _is_glibc() else "as the system has it"


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
