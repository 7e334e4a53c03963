"""Every kind of linearized layer: prefill, chunks and steps agree; padding, packing, caches; against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from kit.modules import modeling
from kit.modules.linear_attention import ABLATIONS, Mixer, branch_weights, original_attention, unrotate

WINDOW, SINKS = 8, 3
KINDS = {
    "window": {"mixers": ["window", "window"], "num_sinks": SINKS},
    "hybrid": {"mixers": ["hybrid", "hybrid"], "num_sinks": SINKS},
    "linear": {"mixers": ["linear", "linear"]},
    "gated": {"mixers": ["gated", "gated"], "num_sinks": SINKS},
    "gated with RoPE": {"mixers": ["gated", "gated"], "num_sinks": 0, "window_rope": True},
    "query maps": {"mixers": ["hybrid", "gated"], "num_sinks": SINKS, "feature_map_heads": "query"},
    "mixed": {"mixers": ["full", "hybrid", "window", "full"], "num_sinks": SINKS},
}


def make(kind, family="llama", window=WINDOW, **extra):
    section = KINDS[kind] | {"feature_dim": 12}
    layers = [{"full": "full_attention"}.get(mixer, "hybrid_sliding") for mixer in section["mixers"]]
    config = getattr(modeling, f"Kit{modeling.FAMILIES[family]}Config")(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        max_position_embeddings=512,
        sliding_window=2 if "linear" in section["mixers"] else window,
        layer_types=layers,
        linear_attention=section,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="kit_linear",
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():  # spread the weights, so that attention is far from uniform
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, Mixer):
            for name, parameter in module.named_parameters():
                torch.nn.init.normal_(parameter, std=0.3 if "gate" in name else 1.0)
    return model


def base_config(model):
    return next(cls for cls in type(model.config).__mro__ if cls.__module__.startswith("transformers.models."))


def tokens(length, batch=3):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stepwise(model, ids, sizes, cache):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_chunks_and_steps_agree_in_both_caches(kind):
    model, ids = make(kind), tokens(34)
    want = model(ids, use_cache=False).logits
    for sizes in ([34], [1] * 34, [2, 1, 12, 1, 1, 17], [20, 14]):
        got = stepwise(model, ids, sizes, DynamicCache(config=model.config))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        got = stepwise(model, ids, sizes, StaticCache(config=model.config, max_cache_len=64))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ABLATIONS)
def test_a_model_without_a_branch_decodes_as_it_prefills(kind, variant):
    model, ids = make(kind), tokens(30)
    with branch_weights(model, *ABLATIONS[variant]):
        want = model(ids, use_cache=False).logits
        got = stepwise(model, ids, [3, 11, 1, 15], DynamicCache(config=model.config))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    untouched = {"window": {"window only"}, "linear": {"linear only"}}.get(kind, set())
    assert torch.allclose(want, model(ids).logits, atol=1e-4) == (variant in untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_no_real_position(kind):
    model = make(kind)
    rows = [tokens(n, 1)[0] for n in (1, 9, 20, 33)]
    padded = torch.stack([F.pad(row, (33 - len(row), 0)) for row in rows])
    mask = (padded != 0).long()
    whole = model(padded, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 14), (14, 15), (15, 31), (31, 32), (32, 33)):
        parts.append(model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    for row, one, other in zip(rows, whole, torch.cat(parts, 1), strict=True):
        want = model(row[None]).logits[0]
        torch.testing.assert_close(one[-len(row) :], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other[-len(row) :], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(kind):
    model = make(kind)
    parts = [tokens(n, 1) for n in (11, 3, 25)]
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    want = torch.cat([model(part).logits for part in parts], 1)
    out = model(torch.cat(parts, 1), position_ids=positions)
    torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=1e-4)
    if kind != "mixed":
        with pytest.raises(ValueError, match="packed batch cannot be continued"):
            model(tokens(1, 1), past_key_values=out.past_key_values)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_beams_and_a_static_cache(kind):
    model, ids = make(kind), tokens(21, 1)
    one = model.generate(ids, max_new_tokens=16, do_sample=False)
    slow = model.generate(ids, max_new_tokens=16, do_sample=False, use_cache=False)
    assert torch.equal(one, slow)
    padded = torch.cat([F.pad(ids, (6, 0)), tokens(27, 1)])
    mask = torch.ones_like(padded)
    mask[0, :6] = 0
    both = model.generate(padded, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(both[:1, 6:], one)
    static = model.generate(ids, max_new_tokens=16, do_sample=False, cache_implementation="static")
    assert torch.equal(static, one)
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_new_attention_switched_off_it_is_the_base_model(kind):
    model, ids = make(kind), tokens(40)
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "layer_types", "auto_map")}
    base = AutoModelForCausalLM.from_config(
        base_config(model)(**values | {"sliding_window": None}), attn_implementation="sdpa"
    ).eval()
    base.load_state_dict(model.state_dict(), strict=False)
    lengths = (17, 23)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(3, -1)
    for options in ({}, {"position_ids": positions}):
        with original_attention(model):
            got = model(ids, use_cache=False, **options).logits
        want = base(ids, use_cache=False, **options).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(ids).logits, got, atol=1e-2)


def test_kept_layers_keep_the_sliding_window_of_the_base():
    model, ids = make("mixed", family="mistral"), tokens(40)
    for layer in model.model.layers:
        layer.self_attn.base_window = 5
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "layer_types", "auto_map")}
    config = base_config(model)(**values | {"sliding_window": 5})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    base.load_state_dict(model.state_dict(), strict=False)
    with original_attention(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_window_with_sinks_is_masked_softmax_attention():
    """The base model behind a 4-D mask: window keys, and the first keys for good."""
    model, ids = make("window"), tokens(40)
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "layer_types", "auto_map")}
    config = base_config(model)(**values | {"sliding_window": None})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    base.load_state_dict(model.state_dict(), strict=True)
    at = torch.arange(40)
    distance = at[:, None] - at
    seen = (distance >= 0) & ((distance < WINDOW) | (at < SINKS))
    want = base(ids, attention_mask=seen[None, None].expand(3, -1, -1, -1)).logits
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", [False, True])
def test_lizard_is_its_equation_token_by_token(rope):
    """In float64, with products of gates instead of their logarithms, and m meta tokens instead of one logit."""
    kind = "gated with RoPE" if rope else "gated"
    model, ids = make(kind).double(), tokens(25, 1)
    attention = model.model.layers[0].self_attn
    mixer, sinks = attention.linear_attention, attention.linear_attention.num_sinks
    seen = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda _, args: seen.update(q=args[0], k=args[1], v=args[2], x=args[3].hidden)),
        mixer.register_forward_hook(lambda _, args, out: seen.update(out=out)),
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    q, k, v = (seen[name][0] for name in "qkv")
    plain_q, plain_k = (
        F.linear(seen["x"], p.weight).view(1, 25, -1, 16).transpose(1, 2)[0]
        for p in (attention.q_proj, attention.k_proj)
    )
    assert torch.allclose(q, plain_q) != rope
    gamma = torch.sigmoid(seen["x"][0] @ mixer.gate[0] + mixer.gate_bias)

    def phi(x, weight):
        z = x @ weight
        return torch.cat([z.softmax(-1), (-z).softmax(-1)])

    for head in range(4):
        for i in (0, 5, 24):
            weights = torch.stack(
                [
                    gamma[t + 1 : i + 1].prod()
                    * (
                        phi(plain_q[head, i], mixer.feature_map_q[head])
                        @ phi(plain_k[head // 2, t], mixer.feature_map_k[head // 2])
                    )
                    for t in range(i + 1)
                ]
            )
            far = weights @ v[head // 2, : i + 1] / weights.sum()
            near = [t for t in range(i + 1) if i - t < WINDOW or t < sinks]
            scores = (k[head // 2, near] @ q[head, i] / 4).exp()
            meta = 4 * (mixer.meta_logit[head] - torch.tensor(4.0).log()).exp()
            anchor = scores @ v[head // 2, near] / (meta + scores.sum())
            want = far + mixer.anchor_weight[head] * anchor
            torch.testing.assert_close(seen["out"][0, head, i], want, atol=1e-6, rtol=1e-6)


def test_gates_that_close_hard_neither_overflow_nor_leave_nothing():
    model, ids = make("gated"), tokens(60)
    for layer in model.model.layers:
        layer.self_attn.linear_attention.gate_bias.fill_(-80.0)
    with torch.enable_grad():
        logits = model(ids).logits
        logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rope_comes_off_again():
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 20), torch.randn(2, 5, 8)
    cos, sin = (torch.cat([f(angle)] * 2, -1) * 1.3 for f in (torch.cos, torch.sin))
    first, second = x[..., :8], x[..., 8:16]
    turned = x[..., :16] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    torch.testing.assert_close(unrotate(torch.cat([turned, x[..., 16:]], -1), cos, sin), x)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("kind", ["hybrid", "linear", "gated", "gated with RoPE", "query maps"])
def test_a_layers_weights_make_its_output(kind, segmented):
    """What the loss on attention weights looks at is what the layer does, also without its window."""
    model, ids = make(kind), tokens(30, 2)
    seen = []
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None].expand(2, -1) if segmented else None
    for variant in ((1, 1), ABLATIONS["linear only"]):
        for layer in model.model.layers:
            mixer = layer.self_attn.linear_attention
            hook = mixer.register_forward_hook(
                lambda mixer, args, out, variant=variant: seen.append((mixer, args, variant))
            )
            with branch_weights(model, *variant):
                model(ids, position_ids=positions, use_cache=False)
            hook.remove()
    for mixer, (q, k, v, step), variant in seen:
        if hasattr(mixer, "anchor_weight"):
            mixer.anchor_weight.abs_()
        with branch_weights(mixer, *variant):
            out = mixer(q, k, v, step)
            parts = [mixer.log_weights(q, k, step, start, min(start + 11, 30)) for start in (0, 11, 22)]
        weights = torch.cat(parts, 2).exp()
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["window", "hybrid", "gated", "linear"])
def test_the_cache_does_not_grow(kind):
    sizes = []
    for length in (40, 80):
        cache = make(kind)(tokens(length), use_cache=True).past_key_values
        layer = cache.layers[0]
        sizes.append(layer.keys.numel() + layer.values.numel() + layer.recurrent_states[0].numel())
    assert sizes[0] == sizes[1]
