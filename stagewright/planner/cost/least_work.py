"""The least device-seconds of a step: every floating-point operation at the peak of its engine, and nothing else.

    work = global_batch * sum_o flops_o * (1 + input_factor_o + weight_factor_o) / peak(engine_o)

with the FLOP of operator o for one sample. Degrees only divide or repeat this work, and no efficiency is above one, so a
step on N devices takes at least work / N whatever the configuration. Layers with measured costs count nothing: their
seconds are what was measured, at any rate. It costs next to nothing, so it bounds what was never priced.
"""

from __future__ import annotations

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.operator_cost import gradient_factors, peak_seconds, work
from stagewright.planner.cost.roofline import Roofline
from stagewright.planner.documents.plan import Degrees


def least_step_s(model: CostModel, num_devices: int) -> float:
    """Return the least seconds of a step on some devices of the model's cluster, all as fast as its fastest kind."""
    work_s = min(_work_s(model, Roofline.of(group.device, model.job.precision)) for group in model.cluster.groups)
    return work_s / num_devices + model.profile.step_overhead_s


def _work_s(model: CostModel, roofline: Roofline) -> float:
    setting = model.setting(Degrees(), 1)
    of_class = {
        name: 0.0
        if layer.costs
        else sum(
            peak_seconds(operator, work(operator, setting).flops, roofline) * (1.0 + sum(gradient_factors(operator)))
            for operator in layer.operators
        )
        for name, layer in model.profile.classes.items()
    }
    return model.job.global_batch * float(sum(of_class[name] for name in model.profile.layer_classes))
