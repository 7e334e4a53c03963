"""Formats against the library that reads them, and storage counted by hand."""

import itertools
import re

import pytest

from kit.convert.formats import WeightFormat, kv_scheme, quantization_config, refusals

INT4, INT4_ZERO, CHANNEL, FP8 = WeightFormat(4, 128), WeightFormat(4, 64, True), WeightFormat(4), WeightFormat(8)
NAMES = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
SHAPES = dict.fromkeys(NAMES, (256, 512))


def make(formats=None, fp8_inputs=True, kv=None, untouched=("lm_head",), extra=None, method="compressed-tensors"):
    return quantization_config(
        formats or dict.fromkeys(NAMES, INT4),
        untouched=list(untouched),
        fp8_inputs=fp8_inputs,
        kv=kv,
        extra=extra or {},
        method=method,
    )


@pytest.mark.parametrize("form", [INT4, INT4_ZERO, CHANNEL, FP8, WeightFormat(4, 32)])
def test_bits_per_weight_counts_what_is_stored(form):
    rows, columns = 256, 512
    groups = rows * (1 if form.group_size is None else columns // form.group_size)
    stored = rows * columns * form.bits + groups * 16 + (groups * 4 if form.zero_point else 0)
    assert form.bits_per_weight((rows, columns)) == stored / (rows * columns)


def test_bits_per_weight_values():
    assert INT4.bits_per_weight((256, 512)) == 4.125
    assert WeightFormat(4, 128, True).bits_per_weight((256, 512)) == 4.15625
    assert INT4_ZERO.bits_per_weight((256, 512)) == 4.3125
    assert CHANNEL.bits_per_weight((256, 512)) == 4.03125
    assert FP8.bits_per_weight((256, 512)) == 8.03125


def test_names():
    assert [str(f) for f in (INT4, INT4_ZERO, CHANNEL, FP8)] == [
        "INT4 group 128",
        "INT4 group 64, zero points",
        "INT4 per channel",
        "FP8 per channel",
    ]


@pytest.mark.parametrize("form", [INT4, INT4_ZERO, CHANNEL, FP8])
@pytest.mark.parametrize("fp8_inputs", [False, True])
@pytest.mark.parametrize("symmetric", [None, False, True])
def test_compressed_tensors_accepts_the_config(form, fp8_inputs, symmetric):
    library = pytest.importorskip("compressed_tensors.quantization")
    kv = None if symmetric is None else kv_scheme(64, symmetric)
    config = make(dict.fromkeys(NAMES, form), fp8_inputs, kv, extra={"note": 1})
    assert config["kit"] == {"note": 1}
    (group,) = config["config_groups"].values()
    assert group["format"] == config["format"] == ("float-quantized" if form is FP8 else "pack-quantized")
    assert group["targets"] == ["Linear"]
    read = library.QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "kit"})
    (scheme,) = read.config_groups.values()
    assert scheme.format == group["format"]
    weights = scheme.weights
    assert (weights.num_bits, str(getattr(weights.type, "value", weights.type)), weights.group_size) == (
        form.bits,
        "float" if form is FP8 else "int",
        form.group_size,
    )
    assert weights.symmetric != form.zero_point
    assert str(getattr(weights.strategy, "value", weights.strategy)) == (
        "channel" if form.group_size is None else "group"
    )
    assert (scheme.input_activations is not None) == fp8_inputs
    if fp8_inputs:
        inputs = scheme.input_activations
        assert (inputs.num_bits, *(str(getattr(x, "value", x)) for x in (inputs.type, inputs.strategy))) == (
            8,
            "float",
            "token",
        )
        assert inputs.dynamic is True
    assert read.ignore == ["lm_head"]
    assert (read.kv_cache_scheme is None) == (symmetric is None)
    if symmetric is not None:
        kv = read.kv_cache_scheme
        assert (kv.num_bits, kv.group_size, kv.symmetric, kv.dynamic) == (4, 64, symmetric, True)


def test_mixed_formats_target_each_linear_once():
    library = pytest.importorskip("compressed_tensors.quantization")
    formats = dict.fromkeys(NAMES, INT4)
    formats |= {name: FP8 for name in NAMES if name.endswith("down_proj")}
    formats["model.layers.1.mlp.up_proj"] = INT4_ZERO
    config = make(formats, extra=None)
    assert "kit" not in config
    assert config["format"] == "mixed-precision"
    library.QuantizationConfig.model_validate(config)
    for name, (_, group) in itertools.product(NAMES, config["config_groups"].items()):
        hit = any(
            re.match(target[3:], name) if target.startswith("re:") else target == name for target in group["targets"]
        )
        assert bool(hit) == (group["weights"] == formats[name].arguments())
        assert group["format"] == ("float-quantized" if group["weights"]["type"] == "float" else "pack-quantized")


def test_a_pattern_spares_untouched_linears_of_the_same_kind():
    formats = {name: FP8 if "mlp" in name else INT4 for name in NAMES}
    untouched = "model.layers.2.mlp.down_proj"
    groups = make(formats, untouched=[untouched])["config_groups"].values()
    for target in (target for group in groups for target in group["targets"]):
        assert target != untouched
        assert not (target.startswith("re:") and re.match(target[3:], untouched))


def test_the_standard_format_is_refused_by_nobody():
    assert refusals(make(), SHAPES, signed=False) == {"transformers": [], "vllm": []}
    config = make(dict.fromkeys(NAMES, FP8))
    assert refusals(config, SHAPES, signed=True) == {"transformers": [], "vllm": []}
    config = make(dict.fromkeys(NAMES, WeightFormat(4, 64)), fp8_inputs=False)
    assert refusals(config, SHAPES, signed=True) == {"transformers": [], "vllm": []}


def test_zero_points_load_in_vllm_but_not_in_transformers():
    config = make(dict.fromkeys(NAMES, WeightFormat(4, 64, True)), fp8_inputs=False)
    found = refusals(config, SHAPES, signed=True)
    assert found["vllm"] == []
    assert "zero points" in found["transformers"][0]


@pytest.mark.parametrize(
    ("change", "signed", "reason"),
    [
        ({"formats": dict.fromkeys(NAMES, WeightFormat(4, 64))}, False, "128 only, not 64"),
        ({"formats": dict.fromkeys(NAMES, CHANNEL)}, False, "128 only, not per-channel"),
        ({"formats": dict.fromkeys(NAMES, WeightFormat(4, 128, True))}, False, "zero points"),
        ({"kv": kv_scheme(64, True)}, False, "kv"),
        ({}, True, "negative group scales"),
    ],
)
def test_vllm_refusals(change, signed, reason):
    found = refusals(make(**change), SHAPES, signed)
    assert bool(found["transformers"]) == (reason == "zero points")
    assert len(found["vllm"]) == 1
    assert reason in found["vllm"][0]


def test_odd_shapes_and_own_methods_are_refused():
    found = refusals(make(), {**SHAPES, "odd": (256, 192)}, False)
    assert len(found["vllm"]) == 1
    assert "odd" in found["vllm"][0]
    found = refusals(make(method="own"), SHAPES, False)
    assert [len(reasons) for reasons in found.values()] == [1, 1]
