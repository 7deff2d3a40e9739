"""The layer tree of a torch model: how it is cut, called between layers, and called on its batches."""

from stagewright.modeling.batch import Batch, call_model, divide_batch
from stagewright.modeling.chain import LayerChain, Segment
from stagewright.modeling.factory import load_object
from stagewright.modeling.layer import Layer, Tie
from stagewright.modeling.split import split

__all__ = ["Batch", "Layer", "LayerChain", "Segment", "Tie", "call_model", "divide_batch", "load_object", "split"]
