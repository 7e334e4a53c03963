"""Linearized model families: prefill, chunks and steps agree; padding, packing, caches, generation."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.pytorch_utils import Conv1D

import kit.modules
from kit.modules import modeling
from kit.modules.linear_attention import ABLATIONS, HybridLinearAttention, branch_weights

WINDOW = 64
FAMILIES = sorted(modeling.FAMILIES)


EXTRA = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "gemma2": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}


def make(family="llama", heads=3, kv_heads=1, window=WINDOW, maps="kv", layers=2, **extra):
    config_class = getattr(modeling, f"Kit{modeling.FAMILIES[family]}Config")
    extra = EXTRA.get(family, {}) | extra
    if family != "gpt2":
        extra |= {"intermediate_size": 64, "num_key_value_heads": kv_heads, "head_dim": 16}
    extra = {
        "layer_types": ["hybrid_sliding"] * layers,
        "linear_attention": {"feature_dim": 16, "feature_map_heads": maps, "window_factor": 0.3},
    } | extra
    config = config_class(
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=97,
        max_position_embeddings=512,
        sliding_window=window,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="kit_linear",
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():  # spread the weights, so that attention is far from uniform
        if isinstance(module, torch.nn.Linear | Conv1D):
            torch.nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, HybridLinearAttention):
            torch.nn.init.normal_(module.feature_map_q)
            torch.nn.init.normal_(module.feature_map_k)
    return model


def tokens(length, batch=3):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_registers_and_attends_through_our_layer(family):
    model = make(family)
    assert type(model).__name__ == f"Kit{modeling.FAMILIES[family]}ForCausalLM"
    assert model.config.model_type == f"kit_{family}"
    assert type(AutoModel.from_config(model.config)) is type(model.base_model)
    with branch_weights(model, 0, 0):
        zeroed = model(tokens(80)).logits
    assert not torch.allclose(zeroed, model(tokens(80)).logits)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
@pytest.mark.parametrize(("heads", "kv_heads", "maps"), [(2, 2, "kv"), (3, 1, "kv"), (3, 1, "query")])
def test_prefill_equals_chunks_equals_steps(length, heads, kv_heads, maps):
    model, ids = make(heads=heads, kv_heads=kv_heads, maps=maps), tokens(length)
    want = model(ids, use_cache=False).logits
    for size in (length, 1, 37):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_step_by_step(family):
    model, ids = make(family, window=8), tokens(30)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 20, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("splits", [[30], [5] + [1] * 25, [1] * 30, [3, 20, 1, 6]])
def test_the_static_cache_gives_the_same(splits):
    model, ids = make(window=8), tokens(30)
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("step", [0, 5])
def test_left_padding_changes_no_real_position(length, step):
    model, ids = make(), tokens(length + step)
    want = model(ids).logits
    pads = [0, 7, 70]
    width = max(pads)
    padded = torch.stack([torch.cat([torch.zeros(width, dtype=torch.long), row]) for row in ids])
    mask = torch.ones_like(padded)
    for row, pad in enumerate(pads):  # row 0 has `width` tokens of real text before it that must not matter: mask all
        mask[row, :width] = 0
        padded[row, : width - pad] = 5
    cache = DynamicCache(config=model.config)
    out = [model(padded[:, : width + length], attention_mask=mask[:, : width + length], past_key_values=cache).logits]
    for at in range(width + length, width + length + step):
        out.append(model(padded[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(out, 1)[:, width:], want, atol=1e-4, rtol=1e-4)


def test_rows_of_different_padding():
    model = make(window=8)
    rows = [tokens(n, 1)[0] for n in (3, 20, 33)]
    padded = torch.stack([torch.nn.functional.pad(row, (33 - len(row), 0)) for row in rows])
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got[-len(row) :], model(row[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_sequences_do_not_see_each_other(family):
    model = make(family, window=8)
    parts = [tokens(n, 1) for n in (11, 3, 25)]
    packed = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    want = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(model(packed, position_ids=positions).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_text_is_the_original_model(family):
    model = make(family, window=64)
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "layer_types", "auto_map")}
    own = 512 if family.startswith("gemma") else None
    values |= {"sliding_window": own, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}
    base_config = type(model.config).__mro__[2](**values)
    base = AutoModelForCausalLM.from_config(base_config, attn_implementation="eager").eval()
    missing, unexpected = base.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("linear_attention" in name for name in unexpected)
    ids = tokens(60)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "olmo2", "gpt2"])
@pytest.mark.parametrize("kind", ["window", "linear", "gated", "full"])
def test_every_kind_of_layer_in_families_unlike_llama(family, kind):
    section = {"mixers": [kind, "hybrid"], "num_sinks": 2, "feature_dim": 16, "feature_map_heads": "kv"}
    kinds = ["full_attention" if kind == "full" else "hybrid_sliding", "hybrid_sliding"]
    model, ids = make(family, window=8, linear_attention=section, layer_types=kinds), tokens(30)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 20, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


SLIDING = ["sliding_attention", "hybrid_sliding", "sliding_attention", "hybrid_sliding"]


def mixed(family, window, own, heads=3):
    """A model whose sliding layers have kept their windows of `own` keys, and whose full ones are hybrids."""
    section = {"mixers": ["full", "hybrid"] * 2, "base_windows": [own, None] * 2, "window_size": window, "num_sinks": 2}
    section |= {"feature_dim": 16, "feature_map_heads": "kv", "window_factor": 0.3}
    cached = max(window, own)
    return make(family, heads, layers=4, window=cached, layer_types=SLIDING, linear_attention=section)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(("window", "own"), [(5, 9), (9, 5), (7, 7)])
def test_layers_that_keep_a_sliding_window_of_their_own(family, window, own):
    model, ids = mixed(family, window, own), tokens(40)
    want = model(ids, use_cache=False).logits
    for splits in ([40], [1] * 40, [3, 17, 1, 19]):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
            parts = [model(part, past_key_values=cache).logits for part in ids.split(splits, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)
    padded = torch.nn.functional.pad(ids, (6, 0))
    mask = (torch.arange(46) >= 6).long().expand(3, -1)
    cache = DynamicCache(config=model.config)
    out = [model(padded[:, :30], attention_mask=mask[:, :30], past_key_values=cache).logits[:, 6:]]
    for at in range(30, 46):
        out.append(model(padded[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(out, 1), want, atol=1e-4, rtol=1e-4)
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    assert sizes == [max(window, own) - 1] * 4  # none grows


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_kept_sliding_layers_and_long_windows_are_the_original_model(family):
    model, ids = mixed(family, 64, 9), tokens(60)
    drop = ("model_type", "layer_types", "auto_map", "linear_attention", "rope_parameters")
    values = {k: v for k, v in model.config.to_dict().items() if k not in drop}
    kinds = [kind.replace("hybrid_sliding", "full_attention") for kind in SLIDING]
    config = type(model.config).__mro__[2](**values | {"sliding_window": 9, "layer_types": kinds})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, _ = base.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


def test_generate_batch_of_one_left_padded_batch_static_cache_and_beams():
    model, ids = make(window=8), tokens(21, 1)
    one = model.generate(ids, max_new_tokens=24, do_sample=False)
    steps = ids
    for _ in range(24):
        steps = torch.cat([steps, model(steps, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(one, steps)
    padded = torch.nn.functional.pad(ids, (6, 0))
    batch = torch.cat([padded, tokens(27, 1)])
    mask = torch.cat([(padded != 0).long(), torch.ones(1, 27, dtype=torch.long)])
    both = model.generate(batch, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert torch.equal(both[:1, 6:], one)
    static = model.generate(ids, max_new_tokens=24, do_sample=False, cache_implementation="static")
    assert torch.equal(static, one)
    beams = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    uncached = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, uncached)
    several = model.generate(ids, max_new_tokens=4, num_return_sequences=3, do_sample=True)
    assert several.shape == (3, 25)


def test_the_cache_is_constant_in_length_and_its_state_is_fp32():
    model = make(window=8).to(torch.bfloat16)
    sizes = []
    for length in (40, 80):
        cache = model(tokens(length), use_cache=True).past_key_values
        layer = cache.layers[0]
        assert layer.recurrent_states[0].dtype == torch.float32
        sizes.append(layer.keys.numel() + layer.values.numel() + layer.recurrent_states[0].numel())
    assert sizes[0] == sizes[1]
    assert layer.recurrent_states[0].shape == (3, 1 * 32 * 17)


def test_no_mask_of_the_square_of_the_length_is_built():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.square = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and list(out.shape).count(333) > 1:
                self.square.append(func)
            return out

    model = make(window=8)
    mask = torch.ones(2, 333, dtype=torch.long)
    mask[0, :9] = 0
    with Shapes() as shapes:
        model(tokens(333, 2), attention_mask=mask, use_cache=True)
    assert not shapes.square


def test_ablations_take_branches_away():
    model, ids = make(window=8), tokens(40)
    full = model(ids).logits
    seen = []
    for weights in ABLATIONS.values():
        with branch_weights(model, *weights):
            seen.append(model(ids).logits)
    assert torch.equal(model(ids).logits, full)
    for i, one in enumerate(seen):
        assert one.isfinite().all()
        assert not torch.allclose(one, full)
        assert not any(torch.allclose(one, other) for other in seen[:i])


def test_linear_weight_zero_in_the_config_is_sliding_window_attention():
    model, ids = make("mistral", window=8), tokens(40)
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "layer_types")}
    base = AutoModelForCausalLM.from_config(type(model.config).__mro__[2](**values), attn_implementation="sdpa").eval()
    base.load_state_dict(model.state_dict(), strict=False)
    for layer in model.model.layers:
        layer.self_attn.linear_attention.linear_weight = 0.0
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 2}, {"assistant_model": torch.nn.Identity()}, {"cache_implementation": "quantized"}],
)
def test_what_cannot_be_rolled_back_is_refused(options):
    with pytest.raises(ValueError, match=r"cannot work on a linearized model[\s\S]*where:[\s\S]*next:"):
        make().generate(tokens(5), max_new_tokens=2, **options)


def test_a_cache_without_state_and_a_4d_mask_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)"):
        model(tokens(5), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="must be 2-D"):
        model(tokens(5), attention_mask=torch.ones(3, 1, 5, 5))


def test_gradients_flow_and_checkpointing_agrees():
    model, ids = make(window=8), tokens(40)
    grads = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train()
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.isfinite().all()
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_save_and_load_with_kit(tmp_path):
    model, ids = make(window=8), tokens(40)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(model)
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
    assert kit.modules is not None
