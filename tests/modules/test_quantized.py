"""Quantized modules in whole models: the packed cache with padding, windows, beams and steps; gradients; ablations."""

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from kit.convert.formats import WeightFormat, kv_scheme, quantization_config
from kit.kernels.int4_fp8 import pack_int4, round_activations, shaping_factor
from kit.modules.cache import cache_argument, carried_cache
from kit.modules.quantized import (
    AttentionQuantization,
    QuantizedLinear,
    _attend_in_two_forms,
    quantize_modules,
    straight_through,
    switched_off,
)

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
HEAD_DIM = 16
CACHE = cache_argument(inspect.signature(LlamaForCausalLM.forward).parameters)
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


def quantization(symmetric=False, post_rope=False, kv=True, query="fp8", window=0):
    formats = {f"model.layers.{i}.{name}": WeightFormat(4, 32) for i in range(2) for name in LINEARS}
    options = {"query": query, "table": False, "center": True, "rotate": True, "shape": True, "post_rope": post_rope}
    options["window"] = window
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
    logits, cache = [state.logits], carried_cache(state)
    for position in range(prompt, ids.shape[1]):
        state = model(ids[:, position : position + 1], use_cache=True, **cache)
        logits.append(state.logits)
    return torch.cat(logits, dim=1), next(iter(cache.values()))


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


def attention_of_two_forms(monkeypatch, window, sliding=None):
    """Let the layers compute, query by query in float64, what reading the last `window` keys unrounded means."""

    def attend(module, query, rounded, latest, attention_mask, given, **kwargs):
        assert given == window
        out = torch.empty(query.shape, dtype=torch.float64)
        groups = query.shape[1] // rounded[0].shape[1]
        past = rounded[0].shape[2] - query.shape[2]
        for t in range(query.shape[2]):
            end = past + t + 1  # of the keys that query t sees
            start = 0 if sliding is None else max(end - sliding, 0)
            near = min(window, end - start)
            stop = latest[0].shape[2] - query.shape[2] + t + 1  # the same end, counted in the latest
            k, v = (
                torch.cat([x[:, :, start : end - near], y[:, :, stop - near : stop]], 2).double()
                for x, y in zip(rounded, latest, strict=True)
            )
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            weights = (query[:, :, t, None].double() @ k.mT * kwargs["scaling"]).softmax(-1)
            out[:, :, t] = (weights @ v)[:, :, 0]
        return out.transpose(1, 2).to(query.dtype)

    monkeypatch.setattr("kit.modules.quantized._attend_in_two_forms", attend)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("sliding", "window"), [(None, 5), (None, 40), (12, 5)])
@torch.no_grad()
def test_the_latest_keys_are_read_unrounded(monkeypatch, sliding, window, implementation):
    config = config_of("mistral", sliding_window=sliding, attn_implementation=implementation)
    model, ids = make(config=config, window=window), tokens(33)
    monkeypatch.setattr("kit.modules.quantized.QUERY_BLOCK", 8)
    got = model(ids, use_cache=False).logits
    attention_of_two_forms(monkeypatch, window, sliding)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, atol=2e-3, rtol=2e-3)
    with switched_off(model, ("kv",)):
        exact = model(ids, use_cache=False).logits
    first = min(window, 33)
    torch.testing.assert_close(got[:, :first], exact[:, :first], atol=1e-4, rtol=1e-4)
    assert window > 33 or not torch.allclose(got[:, first:], exact[:, first:], atol=1e-2)


@pytest.mark.parametrize("sliding", [None, 9])
@pytest.mark.parametrize("prompt", [1, 3, 10, 20])
@torch.no_grad()
def test_steps_and_chunks_read_the_latest_keys_as_one_pass_does(sliding, prompt):
    model = make(config=config_of("mistral", sliding_window=sliding), window=6)
    ids = tokens(24)
    whole = model(ids, use_cache=False).logits
    logits, cache = stepwise(model, ids, prompt)
    assert_near(logits, whole)
    assert cache.layers[0].latest[0].shape[2] == 5  # the window without the query's own key
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split([prompt, 2, 24 - prompt - 2], dim=1):
        parts.append(model(part, use_cache=True, **{CACHE: cache}).logits)
    assert_near(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_a_cropped_cache_reads_what_it_still_holds():
    """After a crop, what had left the window stays rounded: between all rounded and the uncropped cache."""
    model, ids = make(window=6), tokens(20)
    _, cache = stepwise(model, ids, 16)
    cache.crop(-3)
    assert cache.get_seq_length() == 17
    assert cache.layers[0].latest[0].shape[2] == 2
    for part in (ids[:, 17:18], ids[:, 18:20]):
        logits = model(part, use_cache=True, **{CACHE: cache}).logits
    whole = model(ids, use_cache=False).logits[:, 18:]
    assert float((logits - whole).norm() / whole.norm()) < 0.15
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].latest[1].shape[0] == cache.layers[0].values.shape[0] == 3
    cache.reset()
    assert cache.layers[0].latest is None


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other_through_the_window():
    model, ids = make(window=6), tokens(20)
    positions = torch.cat([torch.arange(11), torch.arange(9)]).expand(2, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert_near(packed[:, 11:], model(ids[:, 11:], use_cache=False).logits)


@torch.no_grad()
def test_a_mask_that_cannot_be_read_is_refused():
    model = make(window=4)
    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="attn_implementation"):
        _attend_in_two_forms(model, x, (x, x), (x, x), object(), 4)


@torch.no_grad()
def test_a_static_cache_holds_rounded_numbers():
    model, ids = make(), tokens(12)
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits, _ = stepwise(model, ids, 7, **{CACHE: cache})
    assert_near(logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("window", [0, 4])
@torch.no_grad()
def test_left_padding_changes_nothing(window):
    model, ids = make(window=window), tokens(11, batch=1)
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


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_with_and_without_the_cache(options, window):
    model, ids = make(window=window), tokens(9)
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
