"""INT4 weights with FP8 activations, and the INT4 key/value cache."""

from kit.kernels.int4_fp8.linear import (
    int4_fp8_linear,
    int4_fp8_swiglu,
    int8_linear,
    quantize_fp8,
    rms_norm_quantize,
    swiglu_quantize,
)
from kit.kernels.int4_fp8.packing import PackedInt4, prepack
from kit.kernels.int4_fp8.reference import (
    cast_fp8,
    dequantize_kv,
    dequantize_weight,
    dequantized_linear,
    hadamard,
    pack_int4,
    pack_int8,
    per_tensor_factor,
    quantize_kv,
    round_activations,
    shaping_factor,
    table_weight,
    unpack_int4,
    unpack_int8,
)

__all__ = [
    "PackedInt4",
    "cast_fp8",
    "dequantize_kv",
    "dequantize_weight",
    "dequantized_linear",
    "hadamard",
    "int4_fp8_linear",
    "int4_fp8_swiglu",
    "int8_linear",
    "pack_int4",
    "pack_int8",
    "per_tensor_factor",
    "prepack",
    "quantize_fp8",
    "quantize_kv",
    "rms_norm_quantize",
    "round_activations",
    "shaping_factor",
    "swiglu_quantize",
    "table_weight",
    "unpack_int4",
    "unpack_int8",
]
