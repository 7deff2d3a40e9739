"""What each rank is doing, in a small shared file: one slot a rank, written in place, read by the launcher at any time.

A rank updates its slot before every action, which costs a memory write. The slot outlives the rank, so the launcher can
say where a killed one was.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_SLOT = struct.Struct("<qqii16s")
_POSITION = struct.Struct("<ii")
_SIZE = 64


@dataclass(frozen=True)
class RankStatus:
    """A rank's process, its heartbeats so far, and where it is: step, position in its list of actions, phase."""

    pid: int
    beats: int
    step: int
    position: int
    phase: str


class StatusFile:
    """The slots of all ranks of a run."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), num_ranks * _SIZE)
        self.num_ranks = num_ranks

    @classmethod
    def create(cls, path: Path, num_ranks: int) -> Self:
        """Make an empty file."""
        path.write_bytes(bytes(num_ranks * _SIZE))
        return cls(path, num_ranks)

    def read(self, rank: int) -> RankStatus:
        """Return what a rank is doing; its pid is 0 before it has started."""
        pid, beats, step, position, phase = _SLOT.unpack_from(self._map, rank * _SIZE)
        return RankStatus(pid, beats, step, position, phase.rstrip(b"\0").decode())

    def write(self, rank: int, status: RankStatus) -> None:
        """Set a rank's whole slot."""
        phase = status.phase.encode()[:16]
        _SLOT.pack_into(self._map, rank * _SIZE, status.pid, status.beats, status.step, status.position, phase)

    def at(self, rank: int, step: int, position: int) -> None:
        """Set a rank's step and position."""
        _POSITION.pack_into(self._map, rank * _SIZE + 16, step, position)

    def beat(self, rank: int, beats: int) -> None:
        """Set a rank's heartbeats."""
        struct.pack_into("<q", self._map, rank * _SIZE + 8, beats)

    def enter(self, rank: int, phase: str) -> None:
        """Set a rank's phase."""
        struct.pack_into("16s", self._map, rank * _SIZE + 24, phase.encode()[:16])

    def close(self) -> None:
        """Close the file."""
        self._map.close()
        self._file.close()
