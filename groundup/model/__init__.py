"""The Transformer: configuration, parts, initialization, cost. Knows nothing but itself."""

from groundup.model.attention import KeyValueStore
from groundup.model.config import ModelConfig, RopeScaling, preset, preset_names
from groundup.model.cost import count_parameters, training_flops_per_token
from groundup.model.transformer import OutputLayer, Transformer

__all__ = [
    "KeyValueStore",
    "ModelConfig",
    "OutputLayer",
    "RopeScaling",
    "Transformer",
    "count_parameters",
    "preset",
    "preset_names",
    "training_flops_per_token",
]
