"""Taking over a model's attention calls while a part of its sequence runs.

A mode is active around a segment's forward; it sees every `scaled_dot_product_attention` the model makes, and nothing
else. The second forward of a recomputation enters what `again` returned at the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stagewright.planner.errors import InvalidArgument


class AttentionMode(TorchFunctionMode, ABC):
    """While active, attention calls go to `attend`."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: list[Token[AttentionMode | None]] = []

    @property
    @abstractmethod
    def num_calls(self) -> int:
        """Attention calls so far."""

    @abstractmethod
    def again(self) -> AttentionMode:
        """Return the mode for a second run of the coming calls."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, **options: object) -> Tensor:
        """Return the attention of this part's queries over the whole sequence."""

    def __enter__(self) -> Self:
        self._tokens.append(_ACTIVE.set(self))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _ACTIVE.reset(self._tokens.pop())

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function is functional.scaled_dot_product_attention:
            return self._call(*args, **(kwargs or {}))  # type: ignore[arg-type]
        return function(*args, **(kwargs or {}))

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            raise InvalidArgument(
                "a divided sequence needs attention without a mask of its own, causal or over everything",
                field="data",
                hint="take a plan without sequence slices and context parallelism for this model",
            )
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        return self.attend(query, key, value, causal=is_causal, **options)


def active_attention() -> AttentionMode | None:
    """Return the innermost mode that is active."""
    return _ACTIVE.get()


_ACTIVE: ContextVar[AttentionMode | None] = ContextVar("attention_mode", default=None)
