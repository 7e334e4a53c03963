"""Hybrid softmax-window and linear attention. `hybrid_attention` picks the implementation; today there is one."""

from kit.kernels.linear_attention.reference import hedgehog_feature_map, hybrid_attention, linear_state

__all__ = ["hedgehog_feature_map", "hybrid_attention", "linear_state"]
