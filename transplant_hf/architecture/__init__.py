"""Find, describe and compare decoder layers, and the configuration that builds them: by looking."""

from .anatomy import Anatomy
from .classes import native_class
from .identity import output_projections, projections_of_layers, zero_output_projections
from .names import LayerNames, LayerTensorName
from .native import LayerOrigin, SplicedConfig, splice_config
from .stack import decoder_stack, find_stack, longest_input, text_config, unwrapped

__all__ = [
    "Anatomy",
    "LayerNames",
    "LayerOrigin",
    "LayerTensorName",
    "SplicedConfig",
    "decoder_stack",
    "find_stack",
    "longest_input",
    "native_class",
    "output_projections",
    "projections_of_layers",
    "splice_config",
    "text_config",
    "unwrapped",
    "zero_output_projections",
]
