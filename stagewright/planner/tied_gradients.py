"""What the gradient of a weight that layers share takes of a backward: it waits where one backward passes them all.

The gradient of the later layer, w bytes, waits beside all layers in between, and at the earlier one both lie beside their sum.
A profile is measured over the whole model, so that its workspaces hold this: w in between, 2 w more at the first layer than
it would need for a gradient of its own. Where the layers lie in stages apart, each adds to what stays, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.link_bytes import shared_weights
from stagewright.planner.search.layer_costs import LayerCosts


def not_waiting_bytes(
    plan: Plan, profile: ModelProfile, index: int, row: LayerCosts, bounds: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the bytes of each layer's workspace that are not there in the plan's stage, [layers of the stage]."""
    first, end = bounds[index], bounds[index + 1]
    found = np.zeros(end - first)
    for tie in shared_weights(plan, profile):
        gradient = tie.num_parameters * plan.job.optimizer.gradient_bytes
        if len(tie.stages) == 1:
            continue
        for layer in range(max(first, tie.layers[0]), min(end, tie.layers[-1])):
            kind = profile.classes[profile.layer_classes[layer]]
            workspace = float(row.table.workspace_bytes[0, layer])
            if not kind.costs:
                continue
            if layer in tie.layers:  # its own gradient comes beside that of its output
                alone = gradient + float(row.table.output_bytes[layer])
                found[layer - first] += max(min(2 * gradient, workspace - alone), 0.0)
            else:
                found[layer - first] += gradient
    return found
