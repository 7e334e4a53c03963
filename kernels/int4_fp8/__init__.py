"""INT4 weights with FP8 activations, and the INT4 key/value cache."""

from kit.kernels.int4_fp8.reference import (
    dequantize_kv,
    dequantize_weight,
    hadamard,
    int4_fp8_linear,
    pack_int4,
    per_tensor_factor,
    quantize_fp8,
    quantize_kv,
    round_activations,
    shaping_factor,
    table_weight,
    unpack_int4,
)

__all__ = [
    "dequantize_kv",
    "dequantize_weight",
    "hadamard",
    "int4_fp8_linear",
    "pack_int4",
    "per_tensor_factor",
    "quantize_fp8",
    "quantize_kv",
    "round_activations",
    "shaping_factor",
    "table_weight",
    "unpack_int4",
]
