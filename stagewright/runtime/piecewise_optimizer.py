"""An elementwise optimizer that steps one piece of its parameters after the other, so that little is there for a step.

Two things ask for it. Gradients may be narrower than what is stepped (bf16 beside fp32 masters): each piece's are widened
for its own step. And of the elements that a bucket's optimizer steps, the last share may have its states in host memory
between steps, and its fp32 master weights too where the weights are narrower: the elements that stay are stepped first, then
for one piece after the other its states come in, are stepped on the device and go out again. What stays and has gradients of
its own type is stepped as a whole. Each element is stepped as it would be alone, so the weights are the same bits.

Papers: Zhu et al., Mist, EuroSys 2025; Micikevicius et al., Mixed Precision Training, ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stagewright.planner.cost.memory_actions import PIECE_ELEMENTS, widened_elements
from stagewright.runtime.offload import Count, HostTail

States = dict[str, object]


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


class PiecewiseOptimizer(torch.optim.Optimizer):
    """An elementwise optimizer of parameters with narrower gradients, or whose last elements have their states on the host.

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
        pieces = [(parameter, *piece) for parameter, away in parameters for piece in _cut(parameter, away)]
        whole = [part for parameter, part, _, is_away in pieces if not is_away and not has_narrow_gradients(parameter)]
        self._whole = make(whole) if whole else None  # what is stepped at once
        together = {id(part): self._whole for part in whole if self._whole is not None}
        for parameter, part, begin, is_away in pieces:
            optimizer = together.get(id(part)) or make([part])
            piece = _Piece(part, begin, begin + part.numel(), optimizer, is_away=is_away)
            self._pieces.setdefault(parameter, []).append(piece)
        settings = next(piece for each in self._pieces.values() for piece in each).optimizer.param_groups[0]
        self.param_groups[0].update({key: value for key, value in settings.items() if key != "params"})
        self.state = _WholeStates(self._pieces, copied)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Step what is stepped at once, then the others piece by piece."""
        alone: list[tuple[_Piece, Tensor | None]] = []
        for parameter, pieces in self._pieces.items():
            flat = None if parameter.grad is None else parameter.grad.reshape(-1)
            for piece in pieces:
                gradient = None if flat is None else flat[piece.begin : piece.end]
                piece.optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
                if piece.optimizer is self._whole:
                    piece.part.grad = gradient
                else:
                    alone.append((piece, gradient))
        if self._whole is not None:
            self._whole.step()
        for piece, gradient in alone:
            piece.fetch()
            piece.part.grad = None if gradient is None else gradient.to(piece.part.dtype)
            piece.optimizer.step()
            piece.part.grad = None
            if piece.is_away:
                piece.put_away(self._copied)
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.part.grad = None

    def held_states(self) -> list[object]:
        """Return what there is of states on the device; what is away has empty storages."""
        pieces = [piece for each in self._pieces.values() for piece in each]
        return [value for piece in pieces for value in piece.optimizer.state.get(piece.part, {}).values()]

    def host_bytes(self) -> float:
        """Return the bytes of states in host memory."""
        pieces = [piece for each in self._pieces.values() for piece in each]
        return sum(tail.host_bytes for piece in pieces for tail in piece.tails.values())


def has_narrow_gradients(parameter: Tensor) -> bool:
    """Whether the gradients of a parameter are of another type than itself."""
    return parameter.grad_dtype is not None and parameter.grad_dtype != parameter.dtype


def _cut(parameter: nn.Parameter, away: int) -> Iterator[tuple[nn.Parameter, int, bool]]:
    """Yield the pieces of a parameter whose last `away` elements have their states on the host: each where it begins, whether away."""
    kept = parameter.numel() - away
    size = widened_elements(parameter.device.type) if has_narrow_gradients(parameter) else max(kept, 1)
    for begin in range(0, kept, size) if parameter.numel() else range(1):
        yield _part(parameter, begin, min(begin + size, kept)), begin, False
    for begin in range(kept, parameter.numel(), PIECE_ELEMENTS):
        yield _part(parameter, begin, min(begin + PIECE_ELEMENTS, parameter.numel())), begin, True


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
