"""The costs of every layer under one combination of degrees, as arrays: the seam between cost model and search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.layer_cost import PhaseBytes
from stagewright.planner.documents.profile import Recompute, Source

Floats = npt.NDArray[np.float64]

LEVELS = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Per-device costs of one microbatch, for each of L layers in model order.

    Arrays have shape [L], or [3, L] with the recomputation level first, in the order of LEVELS. Seconds hold compute and
    the part of the layer's own collectives (tensor, context, expert parallel) that is not hidden; data-parallel and
    pipeline communication are not in here. A level that a layer does not offer equals the next weaker one.

    Parameters
    ----------
    forward_s, input_grad_s, weight_grad_s : seconds on one device.
    split_excess_s : what input and weight gradient take longer apart than in one backward.
    recompute_s : seconds added to the backward.
    activation_bytes : kept from the forward until the backward.
    late_bytes : held between the input gradient and the weight gradient, where these are apart. What was recomputed for
        the input gradient waits for the weight gradient, so a level may hold more then than it kept before.
    workspace_bytes : highest temporary use, recomputation's transient included.
    split_workspace_bytes : the same in a schedule that splits every backward, above the larger of what is kept and late.
    output_bytes : boundary tensor one device sends to the next stage.
    dense_parameters, expert_parameters : parameters on one device before ZeRO.
    frozen_parameters : parameters on one device that are not trained, whole under every ZeRO stage.
    optimizer_s : optimizer step of the device's parameters before ZeRO divides it.
    model_flops : forward matrix-product FLOP of the whole layer for this microbatch, over all its devices; of a frozen layer
        the third of what its forward and backward need.
    logits_bytes : the part of the kept bytes that is logits, the same at every level.
    forward_workspace_bytes : highest temporary use of the forward alone, above what is kept.
    input_grad_workspace_bytes : that of an input gradient that runs apart, above the larger of what is kept and late.
    weight_grad_workspace_bytes : that of a weight gradient that runs apart, above what is late. All three are the runtime's: what a
        search takes, the two above, is never less than them by more than a product of a weight gradient.
    unkept_input_bytes : of what a layer is given, that it does not keep: a stage that begins with it does.
    phases : of the backward of each layer, where they were measured.
    link_bytes : bytes one device sends for one microbatch, by "operation/group", each [L].
    again_link_bytes : what full recomputation sends beside that.
    source : the worst provenance among the numbers used.
    """

    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    split_excess_s: Floats
    recompute_s: Floats
    activation_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    split_workspace_bytes: Floats
    output_bytes: Floats
    dense_parameters: Floats
    expert_parameters: Floats
    frozen_parameters: Floats
    optimizer_s: Floats
    model_flops: Floats
    logits_bytes: Floats = field(default_factory=lambda: np.zeros(0))
    link_bytes: Mapping[str, Floats] = field(default_factory=dict)
    again_link_bytes: Mapping[str, Floats] = field(default_factory=dict)
    forward_workspace_bytes: Floats = field(default_factory=lambda: np.zeros((3, 0)))
    input_grad_workspace_bytes: Floats = field(default_factory=lambda: np.zeros((3, 0)))
    weight_grad_workspace_bytes: Floats = field(default_factory=lambda: np.zeros(0))
    unkept_input_bytes: Floats = field(default_factory=lambda: np.zeros((3, 0)))
    phases: tuple[tuple[PhaseBytes, ...], ...] = ()
    source: Source = Source.ANALYTIC
