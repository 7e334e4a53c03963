"""A quantized model on the fused path gives what its modules give: whole sequences, generation, padding, families."""

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

from kit.convert.checkpoint import on_kernels
from kit.convert.formats import PACKED, WeightFormat
from kit.convert.shapes import CACHE, LINEARS, random_model
from kit.kernels.int4_fp8 import pack_int4, shaping_factor
from kit.modules import accelerated
from kit.modules.accelerated import FusedCache, KernelHead, KernelLinear, enable_kernels, left_padding, unsupported
from kit.modules.cache import cache_argument
from kit.modules.quantized import AttentionQuantization, QuantizedLinear, switched_off

TINY = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
OF_FAMILY = {"mistral": {"sliding_window": 24}, "qwen2": {}, "qwen3": {}, "llama": {}}


@pytest.fixture
def make(monkeypatch):
    """A function that makes a quantized model of random weights; the same one for the same arguments."""

    def build(
        family="llama", dtype=torch.float32, *, seed=0, window=8, kv=True, zeros=False, head=False, change=None, **cache
    ):
        options = CACHE | {"window": window} | cache

        def quantization(config, random=accelerated_quantization):
            found = random(config)
            found["kit"] = options  # CACHE itself is shared
            if not kv:
                found["kv_cache_scheme"] = None
            if head:
                first = {"format": PACKED, "targets": ["lm_head"], "weights": WeightFormat(8, integer=True).arguments()}
                first |= {"input_activations": None, "output_activations": None}
                found |= {"ignore": [], "config_groups": {"head": first} | found["config_groups"]}
            if zeros:
                for group in found["config_groups"].values():
                    group["weights"]["symmetric"] = False
            return found

        monkeypatch.setattr("kit.convert.shapes.random_quantization", quantization)
        config = {"model_type": family} | TINY | OF_FAMILY[family] | (change or {})
        model = random_model(config, int4=True, dtype=dtype, device="cpu", seed=seed)
        g = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale.copy_(torch.rand(module.weight_scale.shape, generator=g) * 0.03 + 0.01)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=g))
                if zeros:
                    shape = module.out_features, module.weight_scale.shape[1]
                    module.weight_zero_point.copy_(pack_int4(torch.randint(-8, 8, shape, generator=g).T).T)
            if isinstance(module, AttentionQuantization):
                _fill_attention(module, g)
        return model

    from kit.convert.shapes import random_quantization as accelerated_quantization

    return build


def _fill_attention(module, generator):
    for name in ("key", "value"):
        if module.key_order is not None:
            factor = getattr(module, f"{name}_factor")
            m = torch.randn(factor.shape, generator=generator)
            order, found = shaping_factor(m @ m.transpose(1, 2))
            getattr(module, f"{name}_order").copy_(order)
            factor.copy_(found)
    if module.key_mean is not None:
        module.key_mean.copy_(torch.randn(module.key_mean.shape, generator=generator))
    if module.key_scale is not None:
        module.key_scale.copy_(torch.rand(module.key_scale.shape, generator=generator) + 0.5)


def cache_name(model):
    return cache_argument(inspect.signature(model.forward).parameters)


def prompts(rows=2, length=13):
    ids = torch.randint(4, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    return ids, mask


def generate(model, ids, mask, new=12, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


VARIANTS = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "qwen2, biases, zero points": {"family": "qwen2", "zeros": True},
    "qwen3, norms on heads": {"family": "qwen3"},
    "no window, scales after RoPE": {"window": 0, "post_rope": True, "shape": False},
    "16-bit cache": {"kv": False},
    "a window of all": {"window": 128},
    "output head in INT8": {"head": True},
    "16-bit queries": {"query": None},
    "tied embeddings, one key head": {"change": {"tie_word_embeddings": True, "num_key_value_heads": 1}},
    "heads that lie at no tile": {"change": {"head_dim": 16}},
}


def alike(pairs):
    """Whether most of several pairs of generations are the same: a number at a tie of FP8 may fall to either side."""
    close = [
        torch.equal(got.sequences, want.sequences)
        and torch.allclose(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=2e-4)
        for got, want in pairs
    ]
    return sum(close) > len(close) / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_path_generates_what_the_modules_generate(make, variant):
    """fp32, so that roundings to FP8 and INT4 fall alike, but for ties."""
    (ids, mask), pairs = prompts(), []
    for seed in range(3):
        model = enable_kernels(make(seed=seed, **VARIANTS[variant]), "reference")
        pairs.append((generate(model, ids, mask), generate(make(seed=seed, **VARIANTS[variant]), ids, mask)))
        assert type(pairs[-1][0].get("past_key_values", pairs[-1][0].get("cache"))) is FusedCache
    assert alike(pairs)


def test_other_calls_run_the_models_own_forward_pass_on_the_packed_weights(make):
    ids, mask = prompts()
    plain, model = make(), enable_kernels(make(), "reference")
    assert isinstance(model.model.layers[0].self_attn.k_proj, KernelLinear)
    q, k = model.model.layers[0].self_attn.q_proj.packed, model.model.layers[0].self_attn.k_proj.packed
    assert q.codes.untyped_storage().data_ptr() == k.codes.untyped_storage().data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )
        for parts in (("activations",), ("kv", "query", "activations")):
            with switched_off(model, parts), switched_off(plain, parts):
                torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    beams = [m.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5) for m in (plain, model)]
    assert torch.equal(*beams)


def test_what_the_fast_path_cannot_take_goes_to_the_usual_cache(make):
    ids, _ = prompts()
    mask = torch.ones_like(ids)
    mask[0, 5:7] = 0  # padding between tokens
    want, model = generate(make(), ids, mask), enable_kernels(make(), "reference")
    got = generate(model, ids, mask)
    assert torch.equal(got.sequences, want.sequences)
    cache = got.get("past_key_values", got.get("cache"))
    assert isinstance(cache.delegate, DynamicCache)
    assert cache.get_seq_length() == cache.delegate.get_seq_length()
    shifted = FusedCache(64)
    with torch.no_grad():
        model(ids, position_ids=torch.arange(13)[None] + 2, **{cache_name(model): shifted})
    assert shifted.delegate is not None
    _, mask = prompts()
    assert len(generate(model, ids, mask, 2, output_hidden_states=True).hidden_states[0]) == 3
    with switched_off(model, ("kv",)):
        off = generate(model, ids, mask)
    with switched_off(plain := make(), ("kv",)):
        torch.testing.assert_close(off.logits[3], generate(plain, ids, mask).logits[3], atol=1e-4, rtol=1e-4)


def test_several_sequences_and_chunks_of_a_prompt(make):
    (ids, mask), chunks, samples = prompts(), [], []
    for seed in range(3):
        plain, model = make(seed=seed), enable_kernels(make(seed=seed), "reference")
        chunks.append((generate(model, ids, mask, 4, prefill_chunk_size=5), generate(plain, ids, mask, 4)))
        sampled = []
        for m in (model, plain):
            torch.manual_seed(0)
            sampled.append(generate(m, ids, mask, 4, do_sample=True, num_return_sequences=2))
        samples.append(sampled)
    assert alike(chunks)
    assert alike(samples)


def test_a_cache_says_what_it_cannot_do(make):
    model = enable_kernels(make(), "reference")
    cache, ids = FusedCache(100), torch.arange(4, 24)[None]
    name = cache_name(model)
    with torch.no_grad():
        first = model(ids, **{name: cache}, logits_to_keep=1).logits
        assert first.shape == (1, 1, 96)
        assert cache.get_seq_length() == 20
        for call in (lambda: cache.crop(3), lambda: cache.reorder_cache(torch.tensor([0]))):
            with pytest.raises(ValueError, match="DynamicCache"):
                call()
        with pytest.raises(ValueError, match="room for 128"):
            model(ids.repeat(1, 6), **{name: cache})
        cache.reset()
        torch.testing.assert_close(model(ids, **{name: cache}, logits_to_keep=1).logits, first)


@pytest.mark.skipif(not accelerated.kernels(), reason="no Triton")
def test_the_kernels_in_the_interpreter_give_what_the_specification_gives(make):
    """bf16, where a number beside a tie may fall to either side. A prompt longer than the window, and a step."""
    ids, mask = prompts(2, 12)
    logits = []
    for backend in ("reference", "triton"):
        model = enable_kernels(make(dtype=torch.bfloat16, change={"num_hidden_layers": 1}), backend)
        logits.append(torch.stack(generate(model, ids, mask, new=2).logits).float())
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.15


@pytest.mark.skipif(not accelerated.kernels(), reason="no Triton")
def test_a_step_is_one_graph_for_the_compiler(make):
    """No graph break, hence nothing that is read on the host."""
    fused = enable_kernels(make(dtype=torch.bfloat16, shape=False, change={"num_hidden_layers": 1}), "triton").fused
    stores = [fused.empty_store(1, 64) for _ in range(2)]
    step = torch.compile(fused.step, backend="eager", fullgraph=True)
    for ids in (torch.tensor([[5]]), torch.tensor([[9]])):
        with torch.no_grad():
            torch.testing.assert_close(step(ids, stores[0]), fused.step(ids, stores[1]))
    assert int(stores[0].length) == 2


def test_models_that_the_kernels_cannot_take_are_left_as_they_are_with_one_warning(make):
    model = make()
    accelerated._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"need (a Hopper GPU|Triton)"):
        assert enable_kernels(model) is model
    assert getattr(model, "fused", None) is None
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_kernels(make())
    plain = random_model({"model_type": "llama"} | TINY, int4=False, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="q_proj is Linear"):
        enable_kernels(plain, "reference")
    assert "gpt2" in unsupported(random_gpt2())
    odd = make()
    odd.model.layers[0].mlp.down_proj.weight_scale = torch.nn.Parameter(torch.ones(128, 8))  # groups of 24
    assert "down_proj are 24" in unsupported(odd, "reference")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "RoPE" in unsupported(make(change={"rope_parameters": rope}), "reference")


def test_insisting_on_kernels_that_cannot_take_a_model_fails(make):
    with pytest.raises(ValueError, match=r"Hopper|bfloat16|Triton"):
        enable_kernels(make(), "triton")


def test_gradients_pass_straight_through_the_kernels(make):
    plain, model = make(), enable_kernels(make(), "reference")
    found = []
    for m in (plain, model):
        x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(2)).requires_grad_()
        m(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_a_model_on_the_kernels_is_neither_moved_nor_saved(make, tmp_path):
    model = enable_kernels(make(), "reference")
    for move in (lambda: model.to("meta"), model.bfloat16):
        with pytest.raises(ValueError, match=r"kit\.load"):
            move()
    assert model.lm_head.weight.dtype == torch.float32
    assert model.to("cpu", torch.float32) is model
    with pytest.raises(ValueError, match="repacked"):
        model.save_pretrained(tmp_path)


def test_an_assistant_on_the_kernels_takes_tokens_back(make):
    ids, want = prompts(1)[0], {}
    model, assistant = make(), enable_kernels(make(seed=1), "reference")
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=6, assistant_model=assistant), want)


def test_padding_between_turns_is_refused(make):
    (ids, mask), model = prompts(), enable_kernels(make(), "reference")
    cache, more = FusedCache(64), torch.ones_like(prompts()[0])
    with torch.no_grad():
        model(ids, attention_mask=mask, **{cache_name(model): cache})
        gap = more.clone()
        gap[1, 0] = 0
        with pytest.raises(ValueError, match="hide"):
            model(ids, attention_mask=torch.cat([mask, gap], 1), **{cache_name(model): cache})
        assert cache.get_seq_length() == 13
        model(ids, attention_mask=torch.cat([mask, more], 1), **{cache_name(model): cache})
    assert cache.get_seq_length() == 26


def random_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8))
    return model


def test_left_padding_is_told_from_other_masks():
    given = torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert left_padding(mask, given).tolist() == [0, 2, 3]
    assert left_padding(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), given) is None
    assert left_padding(None, given).tolist() == [0, 0, 0]
    assert left_padding(torch.tensor([[1, 1, 1, 0]] * 3), given) is None
    assert left_padding(torch.ones(3, 9), given) is None


def test_every_linear_of_a_layer_is_replaced(make):
    model = enable_kernels(make(), "reference")
    names = {n.partition("layers.0.")[2] for n, m in model.named_modules() if isinstance(m, KernelLinear)}
    assert names - {""} == set(LINEARS)


def test_a_head_in_int8_is_replaced(make):
    assert isinstance(enable_kernels(make(head=True), "reference").lm_head, KernelHead)
    assert not isinstance(enable_kernels(make(), "reference").lm_head, KernelHead)


def test_loading_onto_a_cpu_changes_nothing_and_says_nothing(make):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_kernels(model) is model
    assert getattr(model, "fused", None) is None
