"""Every format a plan can be written in, by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable

from stagewright.formats.chrome_trace import chrome_trace
from stagewright.formats.deepspeed import deepspeed
from stagewright.formats.exported import Exported, Loss
from stagewright.formats.megatron_args import megatron_args
from stagewright.formats.schedule_svg import schedule_svg
from stagewright.formats.timeline_html import timeline_html
from stagewright.formats.torch_csv import torch_csv
from stagewright.formats.torchtitan import torchtitan
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument, NotExpressible
from stagewright.planner.planned_schedule import schedule_of
from stagewright.planner.prediction import evaluate

Export = Callable[[Plan, ModelProfile], Exported]


def exporter(name: str) -> Export:
    """Return the exporter of a format; raises InvalidArgument with the nearest name."""
    if name in EXPORTERS:
        return EXPORTERS[name]
    nearest = difflib.get_close_matches(name, EXPORTERS, n=1)
    raise InvalidArgument(
        f"there is no exporter for {name!r}",
        field="to",
        hint=(f"did you mean {nearest[0]}? " if nearest else "") + "known: " + ", ".join(EXPORTERS),
    )


def _torch_csv(plan: Plan, _: ModelProfile) -> Exported:
    files = {"schedule.csv": torch_csv(schedule_of(plan.schedule))}
    return Exported(files, (Loss("schedule", "exact"), Loss("stages", "dropped", "the file holds the order alone")))


def _chrome_trace(plan: Plan, profile: ModelProfile) -> Exported:
    trace = chrome_trace(evaluate(plan, profile).timeline, name=plan.model)
    return Exported({"trace.json": json.dumps(trace) + "\n"}, (Loss("schedule", "exact"),))


def _svg(plan: Plan, profile: ModelProfile) -> Exported:
    drawn = schedule_svg(evaluate(plan, profile).timeline, title=f"{plan.model}: {plan.schedule.name}")
    return Exported({"schedule.svg": drawn}, (Loss("schedule", "exact"),))


def _html(plan: Plan, profile: ModelProfile) -> Exported:
    timeline = evaluate(plan, profile).timeline
    page = timeline_html([(plan.schedule.name, timeline)], title=f"{plan.model} on {plan.cluster.name}", facts={})
    return Exported({"timeline.html": page}, (Loss("schedule", "exact"),))


def _configuration(export: Export) -> Export:
    """Return the exporter of a framework's configuration, which has no words for stages whose devices have unlike parts."""

    def checked(plan: Plan, profile: ModelProfile) -> Exported:
        for index, stage in enumerate(plan.stages):
            for name in ("batch_shares", "state_shares", "optimizer_offload"):
                value = getattr(stage, name)
                if value:
                    raise NotExpressible(
                        f"stages[{index}].{name} is {value}, the format gives all devices of a stage equal parts",
                        field=f"stages[{index}].{name}",
                        hint="plan for one kind of device, without --per-stage-degrees",
                    )
        return export(plan, profile)

    return checked


EXPORTERS: dict[str, Export] = {
    "megatron-args": _configuration(megatron_args),
    "deepspeed": _configuration(deepspeed),
    "torchtitan": _configuration(torchtitan),
    "torch-csv": _torch_csv,
    "chrome-trace": _chrome_trace,
    "svg": _svg,
    "html": _html,
}
