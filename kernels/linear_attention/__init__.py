"""Linear attention: hybrid with a softmax window, gated, and the recurrences with channel gates and the delta rule.

Each operation picks its implementation: Triton for bf16 on a CUDA device, PyTorch (the reference) elsewhere. Decoding
steps that CUDA graphs can hold are in `decode_ops`, which needs Triton.
"""

from kit.kernels.linear_attention.dispatch import (
    channel_gated_linear_attention,
    gated_delta_rule,
    gated_linear_attention,
    hybrid_attention,
)
from kit.kernels.linear_attention.reference import Sinks, hedgehog_feature_map, linear_state, sequence_bounds

__all__ = [
    "Sinks",
    "channel_gated_linear_attention",
    "gated_delta_rule",
    "gated_linear_attention",
    "hedgehog_feature_map",
    "hybrid_attention",
    "linear_state",
    "sequence_bounds",
]
