"""Migration: what state moves where when a running job goes from one plan to another."""

from __future__ import annotations

from stagewright.planner.documents.document import Bytes, Index, Name, Part, Seconds


class Move(Part):
    """State of one layer that one device needs and does not hold.

    Parameters
    ----------
    source : the surviving device that sends it; None when no survivor holds it and a checkpoint must.
    target : the device that needs it.
    """

    layer: Name
    source: Index | None
    target: Index
    bytes: Bytes


class Migration(Part):
    """From one plan to another on the devices that are left; devices are numbered as in the new plan.

    Parameters
    ----------
    kept_bytes : already where they are needed.
    moved_bytes : sent from one surviving device to another.
    restored_bytes : held by no surviving device.
    seconds : of the device that sends or receives longest, its messages one after the other.
    previous_step_time_s : step of the plan left behind, on its own devices.
    """

    kept_bytes: Bytes
    moved_bytes: Bytes
    restored_bytes: Bytes
    seconds: Seconds
    previous_step_time_s: Seconds
    moves: tuple[Move, ...] = ()
