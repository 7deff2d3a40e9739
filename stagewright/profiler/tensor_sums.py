"""What the shards of a run would add up over their group, watched in one microbatch of a shard that is alone.

Summed are the outputs of row layers and of embeddings split by the vocabulary, and what enters a head that is. Their sizes
are those of a model's own forward: towers of images and stacks of decoders inside one layer have tensors of their own, and
a layer may be there whose outputs nothing uses, without a backward.

Full recomputation ends with the last tensor that the forward has saved. So the sum of a row layer is sent again where
anything is saved behind it (by a norm or a dropout, by the next part of a block), and is not where nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stagewright.modeling import Batch, LayerChain
from stagewright.modeling.tensor_families import ModuleSplit
from stagewright.modeling.tensor_plan import is_within, tensor_plan
from stagewright.planner.errors import InvalidArgument


@dataclass
class TensorSum:
    """A sum over the group at one module: the whole tensor's bytes, whether full recomputation repeats it, and whether a
    gradient comes back to the module."""

    path: str
    num_bytes: float
    again: bool = False
    has_backward: bool = False


def layer_sums(chain: LayerChain, batch: Batch) -> list[list[TensorSum]]:
    """Return each layer's sums in the order of its forward; none of a model without a tensor plan."""
    try:
        plan = tensor_plan(chain.model)
    except InvalidArgument:
        return [[] for _ in chain.layers]
    watch = _Watch(chain, plan)
    # A compiled layer would run without the hooks of its modules.
    with torch.compiler.set_stance("force_eager"), watch, torch.autograd.graph.saved_tensors_hooks(watch.save, _same):
        (loss,) = chain.segment(0, chain.num_layers)(batch)[chain.num_layers - 1]
        loss.backward()
    return watch.found


class _Watch:
    """A context in which modules of a tensor plan tell what they make, and `save` is told of each saved tensor."""

    def __init__(self, chain: LayerChain, plan: Mapping[str, ModuleSplit]) -> None:
        self.found: list[list[TensorSum]] = [[] for _ in chain.layers]
        self._chain = chain
        self._plan = plan
        self._open: list[TensorSum] = []  # nothing is saved behind them yet
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        get = self._chain.model.get_submodule
        for index, layer in enumerate(self._chain.layers):
            for path, how in self._plan.items():
                if how.role in ("row", "vocabulary") and is_within(path, layer.modules):
                    self._hooks.enter_context(get(path).register_forward_hook(partial(self._add, index, path)))
            for path in layer.modules:  # each is recomputed by itself
                self._hooks.enter_context(get(path).register_forward_hook(self._leave))

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def save(self, tensor: Tensor) -> Tensor:
        for each in self._open:
            each.again = True
        self._open.clear()
        return tensor.detach()  # an output that held itself would never be freed

    def _add(self, index: int, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        enters = self._plan[path].role == "vocabulary" and not isinstance(module, nn.Embedding)
        made = TensorSum(path, float((args[0] if enters else output).nbytes))
        self.found[index].append(made)
        self._open.append(made)
        if output.requires_grad:
            output.register_hook(partial(_notice, made))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._open.clear()


def _notice(made: TensorSum, gradient: Tensor) -> None:
    made.has_backward = True


def _same(tensor: Tensor) -> Tensor:
    return tensor
