"""The Transformer: configuration, parts, initialization, cost. Knows nothing but itself."""

from groundup.model.activations import activation_bytes
from groundup.model.attention import KeyValueStore
from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.cost import count_parameters, training_flops_per_token
from groundup.model.ladder import ladder_config
from groundup.model.presets import preset, preset_names, reshaped
from groundup.model.transformer import OutputLayer, Transformer
from groundup.model.vocabulary import extend_vocabulary

__all__ = [
    "KeyValueStore",
    "ModelConfig",
    "OutputLayer",
    "RopeScaling",
    "Transformer",
    "activation_bytes",
    "count_parameters",
    "extend_vocabulary",
    "ladder_config",
    "preset",
    "preset_names",
    "reshaped",
    "training_flops_per_token",
]
