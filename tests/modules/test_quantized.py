"""Quantized modules in whole models: the packed cache with padding, windows, beams and steps; gradients; ablations."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, StaticCache

from kit.convert.formats import WeightFormat, kv_scheme, quantization_config
from kit.kernels.int4_fp8 import pack_int4, round_activations, shaping_factor
from kit.modules.quantized import (
    AttentionQuantization,
    QuantizedLinear,
    quantize_modules,
    straight_through,
    switched_off,
)

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
HEAD_DIM = 16
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def config_of(family="llama", **extra):
    return FAMILIES[family](
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        vocab_size=97,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **extra,
    )


def quantization(symmetric=False, post_rope=False, kv=True, query="fp8"):
    formats = {f"model.layers.{i}.{name}": WeightFormat(4, 32) for i in range(2) for name in LINEARS}
    options = {"query": query, "table": False, "center": True, "rotate": True, "shape": True, "post_rope": post_rope}
    return quantization_config(
        formats,
        untouched=["lm_head"],
        fp8_inputs=True,
        kv=kv_scheme(HEAD_DIM, symmetric) if kv else None,
        extra=options,
        method="compressed-tensors",
    )


def make(family="llama", *, config=None, **options):
    """A quantized model of random codes; keys have a mean of their own, as real ones do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or config_of(family)).eval()
    quantize_modules(model, quantization(**options))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            n, k = module.out_features, module.in_features
            module.weight_packed.copy_(pack_int4(torch.randint(-8, 8, (n, k))))
            module.weight_shape.copy_(torch.tensor([n, k]))
            module.weight_scale.copy_(0.06 * torch.rand(n, k // 32).add(0.5))
            if module.bias is not None:
                module.bias.copy_(torch.randn(n))
        if isinstance(module, AttentionQuantization):
            if module.key_mean is not None:
                module.key_mean.copy_(torch.randn(2, HEAD_DIM))
            if module.key_scale is not None:
                module.key_scale.copy_(torch.rand(2, HEAD_DIM) + 0.5)
            if module.key_order is not None:
                for name in ("key", "value"):
                    root = torch.randn(2, HEAD_DIM, HEAD_DIM)
                    order, factor = shaping_factor(root @ root.mT)
                    getattr(module, f"{name}_order").copy_(order)
                    getattr(module, f"{name}_factor").copy_(factor)
    return model


def tokens(length, batch=2):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_near(logits, expected):
    """Sums in another order may tip a number over to the next code; more than a few would show here."""
    assert float((logits - expected).norm() / expected.norm()) < 1e-2
    torch.testing.assert_close(logits.median(), expected.median(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def stepwise(model, ids, prompt, **options):
    state = model(ids[:, :prompt], use_cache=True, **options)
    logits, cache = [state.logits], state.past_key_values
    for position in range(prompt, ids.shape[1]):
        state = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(state.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_then_steps_equal_one_pass(family, symmetric):
    model, ids = make(family, symmetric=symmetric), tokens(24)
    logits, cache = stepwise(model, ids, 10)
    assert_near(logits, model(ids, use_cache=False).logits)
    stored = cache.layers[0].keys
    assert stored.dtype == torch.uint8
    assert stored.shape == (2, 2, 24, HEAD_DIM // 2 + (2 if symmetric else 3))


@torch.no_grad()
def test_a_sliding_window_keeps_packed_keys_of_the_window_only():
    model = make(config=config_of("mistral", sliding_window=6))
    ids = tokens(20)
    logits, cache = stepwise(model, ids, 9)
    assert_near(logits, model(ids, use_cache=False).logits)
    assert cache.layers[0].keys.shape[2] == 5  # the window without the token to come
    assert cache.layers[0].keys.dtype == torch.uint8


@torch.no_grad()
def test_a_static_cache_holds_rounded_numbers():
    model, ids = make(), tokens(12)
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits, _ = stepwise(model, ids, 7, past_key_values=cache)
    assert_near(logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_left_padding_changes_nothing():
    model, ids = make(), tokens(11, batch=1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(16) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert_near(logits, model(ids).logits)
    both = torch.cat([padded, tokens(16, batch=1)])
    mask = torch.cat([mask, torch.ones(1, 16, dtype=torch.long)])
    generated = model.generate(both, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[:1, 16:], alone[:, 11:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_with_and_without_the_cache(options):
    model, ids = make(), tokens(9)
    known = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    assert torch.equal(model.generate(ids, **known), model.generate(ids, use_cache=False, **known))


@pytest.mark.parametrize("post_rope", [False, True])
@torch.no_grad()
def test_what_is_done_to_keys_is_no_change_of_attention(post_rope):
    """Mean, scale and rotation leave the scores' softmax as it is: only rounding may move the output."""
    ids, model = tokens(20), make(post_rope=post_rope)
    plain = make(kv=False, query=None)
    plain.load_state_dict(model.state_dict(), strict=False)
    with switched_off(plain, ("activations",)):
        expected = plain(ids).logits
    with switched_off(model, ("kv", "query", "activations")):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with switched_off(model, ("activations",)):
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


@torch.no_grad()
def test_switching_off_leaves_no_trace():
    ids, model = tokens(8), make()
    before = model(ids).logits
    with switched_off(model, ("kv", "query", "activations")):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_gradients_pass_the_roundings_of_a_linear():
    """∂L/∂scale and ∂L/∂x are those of x̂ (levels · scale)ᵀ, x̂ the rounded input."""
    torch.manual_seed(1)
    linear = make().model.layers[0].mlp.up_proj
    linear.weight_scale.requires_grad_(True)
    x, direction = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96)
    (linear(x) * direction).sum().backward()
    codes = (linear.dequantize().detach() / linear.weight_scale.detach().repeat_interleave(32, 1)).round().double()
    scale = linear.weight_scale.detach().double().requires_grad_(True)
    rounded = round_activations(x.detach()).double().requires_grad_(True)
    weight = codes * scale.repeat_interleave(32, 1)
    ((rounded @ weight.T) * direction.double()).sum().backward()
    torch.testing.assert_close(linear.weight_scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), rounded.grad, rtol=1e-4, atol=1e-4)


def test_the_cache_and_the_queries_pass_gradients():
    model, ids = make(), tokens(12)
    k_proj, q_proj = (getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "kq")
    for linear in (k_proj, q_proj):
        linear.weight_scale.requires_grad_(True)
    model(ids, use_cache=False, labels=ids).loss.backward()
    for linear in (k_proj, q_proj):
        assert float(linear.weight_scale.grad.abs().max()) > 0
    x = torch.tensor([0.3, 1.7], requires_grad=True)
    straight_through(x, torch.round).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
