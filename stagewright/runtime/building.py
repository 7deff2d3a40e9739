"""Building a run's model and cutting it where its profile says."""

from __future__ import annotations

import torch
from torch import nn

from stagewright.modeling.autocast import with_autocast
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.expert_capacity import limit_experts
from stagewright.modeling.factory import load_object
from stagewright.modeling.hugging_face import huggingface_model, is_huggingface
from stagewright.modeling.split import split
from stagewright.modeling.tensor_plan import tensor_plan
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument, InvalidDocument, StagewrightError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(reference: str, plan: Plan, *, seed: int) -> nn.Module:
    """Return what the factory or the Hugging Face configuration makes, in the job's precision.

    Raises InvalidArgument when it makes no module. Experts take no more tokens than the plan's `capacity_factor` allows, where it has one.
    """
    torch.manual_seed(seed)
    model = huggingface_model(reference) if is_huggingface(reference) else _made(reference)
    factor = plan.schedule.parameters.get("capacity_factor")
    if factor is not None:
        limit_experts(model, float(factor))
    return model.to(DTYPES[plan.job.precision])


def _made(reference: str) -> nn.Module:
    factory = load_object(reference)
    if not callable(factory):
        raise InvalidArgument(f"{reference} is no factory", field="model")
    model = factory()
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"{reference} returned {type(model).__name__}, no nn.Module", field="model")
    return model


def autocast_type(plan: Plan) -> torch.dtype | None:
    """Return the type of matrix products that the plan's `autocast` names; None where they are in the job's precision."""
    told = plan.schedule.parameters.get("autocast")
    return None if told is None else DTYPES[str(told)]


def split_as_profiled(
    model: nn.Module, reference: str, profile: ModelProfile, plan: Plan, device: torch.device
) -> LayerChain:
    """Return the model's layers, in the plan's mixed precision; raises InvalidDocument when they are not the profile's."""
    return with_autocast(_profiled(model, reference, profile), autocast_type(plan), device)


def refuse_other_layers(reference: str, profile: ModelProfile, plan: Plan) -> None:
    """Raise InvalidDocument when the model's layers are not the profile's, as far as can be told without its values.

    Raises InvalidArgument when the plan splits tensors of a model that does not say how.

    A factory that fails on the meta device, since it looks at values or asks for its rank, is left to the ranks, which compare too.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(reference, plan, seed=0)
    except StagewrightError:
        raise
    except Exception:
        return
    _profiled(model, reference, profile)
    if any(stage.degrees.tp > 1 for stage in plan.stages):
        tensor_plan(model)


def _profiled(model: nn.Module, reference: str, profile: ModelProfile) -> LayerChain:
    chain = split(model)
    if chain.layer_digest != profile.layer_digest:
        raise InvalidDocument(
            f"{reference} has layers {chain.layer_digest}, the profile {profile.layer_digest}",
            field="layer_digest",
            hint="profile and plan this model again",
        )
    return chain
