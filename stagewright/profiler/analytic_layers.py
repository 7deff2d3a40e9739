"""An analytic profile over the layers of the model that runs: the same layers, under the names that the model's modules have."""

from __future__ import annotations

from stagewright.modeling.chain import LayerChain
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.profiler.model_shapes import weight_tensors
from stagewright.profiler.profile_document import edges_of, layer_runs, ties_of

_HINT = "measure the model (stagewright profile), and plan with that profile"


def over_layers(profile: ModelProfile, chain: LayerChain) -> ModelProfile:
    """Return the profile with the model's layers, classes and ties, at the costs of its own layers one by one.

    Raises InvalidDocument where the model has other layers, numbers of parameters or connections than the profile.
    """
    if chain.num_layers != profile.num_layers:
        raise InvalidDocument(
            f"the model has {chain.num_layers} layers, the profile {profile.num_layers}", field="layers", hint=_HINT
        )
    if tuple(chain.edges) != tuple(profile.edge_indices):
        raise InvalidDocument(
            "the model's layers are connected otherwise than the profile's", field="edges", hint=_HINT
        )
    classes = {}
    tensors = weight_tensors(chain)
    for layer, own in zip(chain.layers, profile.layer_classes, strict=True):
        known = profile.classes[own]
        if layer.num_parameters != known.parameters:
            raise InvalidDocument(
                f"layer {layer.name} has {layer.num_parameters} parameters, {own} of the profile {known.parameters}",
                field=f"classes.{own}.parameters",
                hint=_HINT,
            )
        found = known.model_copy(update={"kind": layer.kind, "tensors": tensors[layer.name]})
        if classes.setdefault(layer.layer_class, found) != found:
            raise InvalidDocument(
                f"layer {layer.name} is like one that the profile gives other costs than {own}",
                field="layers",
                hint=_HINT,
            )
    fields = {name: getattr(profile, name) for name in ModelProfile.model_fields}
    return ModelProfile(
        **{
            **fields,
            "layers": layer_runs(chain.layers),
            "classes": classes,
            "edges": edges_of(chain),
            "tied": ties_of(chain),
        }
    )
