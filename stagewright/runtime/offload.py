"""Optimizer states that lie in host memory between steps and come to the device piece by piece for the step (Mist).

Of the elements that a bucket's optimizer steps, the last share has its states on the host, and its fp32 master weights too
where the weights are narrower. A step takes the elements that stay first, then one piece of at most `PIECE_ELEMENTS` after
the other: its states come in, are stepped on the device and go out again, so that one piece at most is there beside what
stays. Each element is stepped as it would be without, so the weights are the same bits.

What is away has no memory on the device: its storage is empty until it is fetched. On a CPU device both memories are the
same kind, and are counted apart all the same.

Papers: Zhu et al., Mist, EuroSys 2025; Ren et al., ZeRO-Offload, USENIX ATC 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stagewright.planner.cost.memory_actions import PIECE_ELEMENTS

Count = Callable[[float], None]
States = dict[str, object]


class HostTail:
    """The last elements of a flat tensor that owns its storage, in host memory while they are put away.

    Parameters
    ----------
    count : how many elements.
    copied : told the bytes of each copy.
    """

    def __init__(self, value: Tensor, count: int, copied: Count) -> None:
        self._value = value
        self._kept = value.numel() - count
        self._copied = copied
        self._host = torch.empty(count, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        self._is_here = True

    @property
    def host_bytes(self) -> float:
        """Bytes of host memory."""
        return float(self._host.untyped_storage().nbytes())

    def fetch(self) -> None:
        """Bring the elements to the device, unless they are there."""
        if self._is_here:
            return
        self._value.untyped_storage().resize_(self._value.numel() * self._value.element_size())
        self._value[self._kept :].copy_(self._host)
        self._copied(self.host_bytes)
        self._is_here = True

    def put_away(self) -> None:
        """Bring the elements to the host and free their memory on the device."""
        if not self._is_here:
            return
        self._host.copy_(self._value[self._kept :])
        self._copied(self.host_bytes)
        self._value.untyped_storage().resize_(self._kept * self._value.element_size())
        self._is_here = False


@dataclass
class _Piece:
    """Elements `begin` to `end` - 1 of a parameter, with the optimizer that steps them."""

    part: nn.Parameter
    begin: int
    end: int
    optimizer: torch.optim.Optimizer
    is_away: bool
    tails: dict[str, HostTail] = field(default_factory=dict)

    def fetch(self) -> None:
        for tail in self.tails.values():
            tail.fetch()

    def put_away(self, copied: Count) -> None:
        """Put away all states, those that the step has just made too."""
        for key, value in self.optimizer.state[self.part].items():
            if isinstance(value, Tensor) and value.dim() and key not in self.tails:
                self.tails[key] = HostTail(value, value.numel(), copied)
        for tail in self.tails.values():
            tail.put_away()


class OffloadedOptimizer(torch.optim.Optimizer):
    """An elementwise optimizer of parameters of which the last elements have their states on the host.

    Parameters
    ----------
    make : makes the optimizer of given parameters.
    parameters : each with how many of its elements are away.
    copied : told the bytes of each copy between device and host.
    """

    def __init__(
        self,
        make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        parameters: Sequence[tuple[nn.Parameter, int]],
        copied: Count,
    ) -> None:
        super().__init__([parameter for parameter, _ in parameters], {})
        self._copied = copied
        self._pieces: dict[nn.Parameter, list[_Piece]] = {}
        staying: list[tuple[nn.Parameter, int, int, nn.Parameter]] = []
        leaving: list[tuple[nn.Parameter, int, int, nn.Parameter]] = []
        for parameter, away in parameters:
            kept = parameter.numel() - away
            if kept:
                staying.append((parameter, 0, kept, _part(parameter, 0, kept)))
            for begin in range(kept, parameter.numel(), PIECE_ELEMENTS):
                end = min(begin + PIECE_ELEMENTS, parameter.numel())
                leaving.append((parameter, begin, end, _part(parameter, begin, end)))
        optimizers = [make([part for *_, part in staying])] if staying else []
        optimizers += [make([part]) for *_, part in leaving]
        self.param_groups[0].update(
            {key: value for key, value in optimizers[0].param_groups[0].items() if key != "params"}
        )
        for parameter, begin, end, part in staying:
            self._add(parameter, _Piece(part, begin, end, optimizers[0], is_away=False))
        for (parameter, begin, end, part), optimizer in zip(
            leaving, optimizers[len(optimizers) - len(leaving) :], strict=True
        ):
            self._add(parameter, _Piece(part, begin, end, optimizer, is_away=True))
        self._staying = optimizers[0] if staying else None
        self.state = _WholeStates(self._pieces, copied)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Step the elements that stay, then the others piece by piece."""
        for parameter, pieces in self._pieces.items():
            flat = None if parameter.grad is None else parameter.grad.reshape(-1)
            for piece in pieces:
                piece.part.grad = None if flat is None else flat[piece.begin : piece.end]
                piece.optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        if self._staying is not None:
            self._staying.step()
        for pieces in self._pieces.values():
            for piece in pieces:
                if piece.is_away:
                    piece.fetch()
                    piece.optimizer.step()
                    piece.put_away(self._copied)
                piece.part.grad = None

    def held_states(self) -> list[object]:
        """Return what there is of states on the device; what is away has empty storages."""
        pieces = [piece for each in self._pieces.values() for piece in each]
        return [value for piece in pieces for value in piece.optimizer.state.get(piece.part, {}).values()]

    def host_bytes(self) -> float:
        """Return the bytes of states in host memory."""
        pieces = [piece for each in self._pieces.values() for piece in each]
        return sum(tail.host_bytes for piece in pieces for tail in piece.tails.values())

    def _add(self, parameter: nn.Parameter, piece: _Piece) -> None:
        self._pieces.setdefault(parameter, []).append(piece)


class _WholeStates(MutableMapping[nn.Parameter, States]):
    """The states of whole parameters, put together when they are read and divided when they are set."""

    def __init__(self, pieces: dict[nn.Parameter, list[_Piece]], copied: Count) -> None:
        self._pieces = pieces
        self._copied = copied

    def __getitem__(self, parameter: nn.Parameter) -> States:
        pieces = self._pieces[parameter]
        first = pieces[0].optimizer.state.get(pieces[0].part)
        if not first:
            raise KeyError(parameter)
        for piece in pieces:
            piece.fetch()
        found: States = {
            key: torch.cat([_state(piece, key) for piece in pieces]).view(parameter.shape)
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in first.items()
        }
        for piece in pieces:
            if piece.is_away:
                piece.put_away(self._copied)
        return found

    def __setitem__(self, parameter: nn.Parameter, state: States) -> None:
        for piece in self._pieces[parameter]:
            piece.tails.clear()
            piece.optimizer.state[piece.part] = {
                key: value.reshape(-1)[piece.begin : piece.end].clone()
                if isinstance(value, Tensor) and value.dim()
                else (value.clone() if isinstance(value, Tensor) else value)
                for key, value in state.items()
            }
            if piece.is_away:
                piece.put_away(self._copied)

    def __delitem__(self, parameter: nn.Parameter) -> None:
        for piece in self._pieces[parameter]:
            piece.tails.clear()
            piece.optimizer.state.pop(piece.part, None)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._pieces if self._has(parameter))

    def __len__(self) -> int:
        return sum(map(self._has, self._pieces))

    def _has(self, parameter: nn.Parameter) -> bool:
        piece = self._pieces[parameter][0]
        return bool(piece.optimizer.state.get(piece.part))


def _part(parameter: nn.Parameter, begin: int, end: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().view(-1)[begin:end], requires_grad=parameter.requires_grad)


def _state(piece: _Piece, key: str) -> Tensor:
    value = piece.optimizer.state[piece.part][key]
    assert isinstance(value, Tensor)
    return value


def last_elements(sizes: Sequence[int], count: int) -> list[int]:
    """Return how many elements of each of several tensors are among the last `count` of all of them."""
    found = []
    for size in reversed(sizes):
        found.append(min(size, count))
        count -= found[-1]
    return found[::-1]
