"""Gathering a stage's sharded layers one by one, the next one under the work of the last (FSDP).

A layer's parameters are gathered when its forward begins, and again when the gradient of its output arrives; then every
other layer's are freed and those of the next layer in the direction of the work start to come. So at most two layers are
whole at a time:

    peak of parameters = all / n + the largest two neighbours

Each unit, a microbatch or a slice of one, gathers each layer once forward and once backward; weight gradients need none.

Paper: Zhao et al., PyTorch FSDP, VLDB 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from stagewright.runtime.sharding import ShardedBucket


class GatherWindow:
    """The sharded layers of one stage, of which at most two are whole.

    Parameters
    ----------
    layers : the buckets of each layer, in layer order, with the modules that use them. Buckets without modules are gathered
        for the whole of a forward or backward.

    `peak_bytes` is the most that was whole at a time.
    """

    def __init__(self, layers: Sequence[tuple[Sequence[ShardedBucket], Sequence[nn.Module]]]) -> None:
        self._loose = [bucket for buckets, modules in layers if not modules for bucket in buckets]
        self._layers = [buckets for buckets, modules in layers if modules]
        self._direction = 0
        self.peak_bytes = 0
        for index, modules in enumerate(modules for _, modules in layers if modules):
            for module in modules:
                module.register_forward_pre_hook(lambda _module, _args, index=index: self._need(index))
                module.register_forward_hook(
                    lambda _module, args, kwargs, output, index=index: self._need_with_gradient(
                        index, (args, kwargs), output
                    ),
                    with_kwargs=True,
                )

    def begin(self, direction: int) -> None:
        """Take note that a forward (1) or a backward (-1) begins."""
        self.end()
        self._direction = direction
        for bucket in self._loose:
            bucket.start_gather()
            bucket.wait_gathered()
        if self._layers:
            _start(self._layers[0 if direction > 0 else -1])

    def end(self) -> None:
        """Free everything."""
        self._direction = 0
        for bucket in self._all():
            bucket.reshard()

    def _all(self) -> list[ShardedBucket]:
        return [*self._loose, *(bucket for buckets in self._layers for bucket in buckets)]

    def _need(self, index: int) -> None:
        """Have one layer whole, and its neighbour on the way."""
        if self._direction == 0:
            return
        following = index + self._direction
        for other, buckets in enumerate(self._layers):
            if other not in (index, following):
                for bucket in buckets:
                    bucket.reshard()
        _start(self._layers[index])
        if 0 <= following < len(self._layers):
            _start(self._layers[following])
        for bucket in self._layers[index]:
            bucket.wait_gathered()
        whole = sum(bucket.num_bytes for bucket in self._all() if bucket.is_whole)
        self.peak_bytes = max(self.peak_bytes, whole)

    def _need_with_gradient(self, index: int, given: object, output: object) -> None:
        """Have the layer whole again when the gradient of its output arrives.

        Of what it only passes on (T5's bias of positions) the gradient is complete when the layer's own backward is done.
        """
        if self._direction < 0:  # a forward that is run again
            return
        passed_on = {id(value) for value in _tensors(given)}
        for value in _tensors(output):
            if value.requires_grad and id(value) not in passed_on:
                value.register_hook(lambda _gradient: self._need(index))


def _start(buckets: Iterable[ShardedBucket]) -> None:
    for bucket in buckets:
        bucket.start_gather()


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
