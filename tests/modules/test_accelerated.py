"""A quantized model on the fused path gives what its modules give: whole sequences, generation, padding, families."""

import contextlib
import copy
import functools
import inspect
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from kit.convert.checkpoint import on_kernels
from kit.convert.formats import PACKED, WeightFormat
from kit.convert.shapes import CACHE, LINEARS, random_model, shape_config
from kit.kernels.int4_fp8 import pack_int4, shaping_factor
from kit.modules import accelerated, graphs
from kit.modules.accelerated import (
    FusedCache,
    KernelHead,
    KernelLinear,
    enable_kernels,
    left_padding,
    unsupported,
)
from kit.modules.cache import cache_argument
from kit.modules.graphs import StepGraph
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
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # of the Triton kernels: elsewhere they run in the interpreter
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
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
        torch.testing.assert_close(
            model(ids, output_hidden_states=True).logits, plain(ids).logits, atol=1e-5, rtol=1e-5
        )
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
        for what, call in {
            "holds 1 rows, and 2": {"input_ids": ids.repeat(2, 1)},
            "hidden states": {"input_ids": ids, "output_hidden_states": True},
            "losses": {"input_ids": ids[:, :1], "labels": ids[:, :1]},
            "counts positions": {"input_ids": ids, "position_ids": torch.arange(20)[None]},
        }.items():
            with pytest.raises(ValueError, match=f"{what}.*\n.*\n.*DynamicCache"):
                model(**call, **{name: cache})
        assert cache.get_seq_length() == 20
        cache.reset()
        torch.testing.assert_close(model(ids, **{name: cache}, logits_to_keep=1).logits, first)


@pytest.mark.skipif(not accelerated.kernels(), reason="no Triton")
def test_the_kernels_give_what_the_specification_gives(make):
    """bf16, where a number beside a tie may fall to either side. A prompt longer than the window, and a step."""
    ids, mask = (x.to(DEVICE) for x in prompts(2, 12))
    logits = []
    for backend in ("reference", "triton"):
        model = make(dtype=torch.bfloat16, change={"num_hidden_layers": 1}).to(DEVICE)
        logits.append(torch.stack(generate(enable_kernels(model, backend), ids, mask, new=2).logits).float())
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.15


@pytest.mark.skipif(not accelerated.kernels(), reason="no Triton")
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=needs_gpu)])
def test_a_step_is_one_graph_for_the_compiler(make, compiler):
    """No graph break, hence nothing that is read on the host."""
    model = make(dtype=torch.bfloat16, shape=False, change={"num_hidden_layers": 1}).to(DEVICE)
    fused = enable_kernels(model, "triton").fused
    stores = [fused.empty_store(1, 64) for _ in range(2)]
    step = torch.compile(fused.step, backend=compiler, fullgraph=True)
    for ids in (torch.tensor([[5]], device=DEVICE), torch.tensor([[9]], device=DEVICE)):
        with torch.no_grad():
            got, want = step(ids, stores[0]).float(), fused.step(ids, stores[1]).float()
        assert float((got - want).norm() / want.norm()) < (1e-6 if compiler == "eager" else 0.1)
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


def steps(model, cache, ids, chunks):
    """Logits of ids given to one cache in chunks."""
    with torch.no_grad():
        parts = [model(part, **{cache_name(model): cache}, use_cache=True).logits for part in ids.split(chunks, 1)]
    return torch.cat(parts, 1)


def tokens(rows, length):
    return torch.randint(4, 96, (rows, length), generator=torch.Generator().manual_seed(2))


def a_cache(model):
    return DynamicCache(config=model.config) if getattr(model, "fused", None) is None else FusedCache(8)


@pytest.mark.parametrize("variant", ["llama", "16-bit cache", "a window of all", "no window, scales after RoPE"])
def test_a_cache_that_is_full_grows_and_nothing_else_changes(make, variant):
    """Against a cache that was large enough from the start, to the bit, in steps and in chunks."""
    model, ids = enable_kernels(make(**VARIANTS[variant]), "reference"), tokens(2, 290)
    chunks = [120, *[1] * 12, 150, *[1] * 8]
    small, large = FusedCache(16), FusedCache(400)
    assert torch.equal(steps(model, small, ids, chunks), steps(model, large, ids, chunks))
    assert (small.store.capacity, large.store.capacity) == (512, 512)  # 128, 256, 512
    assert torch.equal(small.store.recent, large.store.recent)
    assert torch.equal(small.store.codes, large.store.codes)


@pytest.mark.parametrize(("window", "given"), [(8, 1), (8, 3), (128, 3), (0, 1)])
def test_a_call_that_fails_can_be_made_again(make, monkeypatch, window, given):
    """As if its tokens had been given and taken back."""
    model, ids = enable_kernels(make(window=window), "reference"), tokens(1, 20 + given)
    cache, whole = FusedCache(64), FusedCache(64)
    steps(model, cache, ids[:, :20], [20])
    once = steps(model, whole, ids, [20, given])[:, 20:]
    whole.crop(-given)
    want = steps(model, whole, ids[:, 20:], [given])
    if (window, given) != (8, 3):  # else keys that the window had lost come back rounded
        torch.testing.assert_close(want, once, atol=1e-5, rtol=1e-5)

    def full(*_):
        raise torch.OutOfMemoryError

    for owner, name in ((model.lm_head, "forward"), (accelerated, "quantize_fp8")):  # as a token is counted, and before
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, full)
            with pytest.raises(torch.OutOfMemoryError):
                steps(model, cache, ids[:, 20:], [given])
        assert cache.get_seq_length() == int(cache.store.length) == 20
    assert torch.equal(steps(model, cache, ids[:, 20:], [given]), want)


def test_growth_makes_a_captured_step_stale(make):
    model = enable_kernels(make(), "reference")
    cache = FusedCache(1)
    steps(model, cache, tokens(1, 128), [128])
    cache.graph, cache.warm = "captured", True
    cache.grow(128)
    assert cache.graph
    cache.grow(129)
    assert (cache.graph, cache.warm, cache.store.capacity) == (None, False, 256)
    cache.graph = "captured"
    cache.grow(900)
    assert cache.store.capacity == 1024


def test_nothing_that_counts_on_the_host_is_captured(make, monkeypatch):
    model, ids = enable_kernels(make(), "reference"), tokens(1, 20)
    monkeypatch.setattr(model.fused, "captured", lambda: True)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cannot be captured.*\n.*\n.*fused\.step"):
            model(ids, **{cache_name(model): FusedCache(64)})
        assert model(ids, use_cache=False).logits.shape == (1, 20, 96)  # the model's own forward pass can be


@pytest.mark.parametrize("window", [8, 0, 128])
def test_tokens_taken_back_leave_no_trace_but_rounding(make, window):
    """Where all that queries read unrounded is still held, the next tokens see what they would have seen."""
    model, ids = enable_kernels(make(window=window), "reference"), tokens(2, 40)
    want, cropped = FusedCache(64), FusedCache(64)
    steps(model, want, ids[:, :20], [20])
    steps(model, cropped, ids[:, :25], [20, 2, 3])
    cropped.crop(-5)
    assert cropped.get_seq_length() == int(cropped.store.length) == 20
    ring = want.store.recent - cropped.store.recent
    one, two = (steps(model, cache, ids[:, 30:34], [1, 3]) for cache in (want, cropped))
    if window == 8:  # the window has moved on by five
        slots = [t % 8 for t in range(12, 20)]
        assert torch.equal(ring[..., slots[5:], :], torch.zeros_like(ring[..., slots[5:], :]))
        lost = ring[..., slots[:5], :]
        assert 0 < float(lost.norm()) < 0.15 * float(want.store.recent.norm())  # INT4's rounding
        assert float((one - two).norm() / one.norm()) < 0.3
    else:
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    cropped.crop(20)  # the older form: how many are left
    assert cropped.get_seq_length() == 20
    cropped.crop(-100)
    assert cropped.get_seq_length() == 0


def test_rows_are_reordered_repeated_and_kept(make):
    model, ids = enable_kernels(make(), "reference"), tokens(3, 24)
    whole = steps(model, FusedCache(64), ids, [20, 4])[:, 20:]
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        cache = FusedCache(64)
        steps(model, cache, ids[:, :20], [20])
        cache.graph = "captured"
        change(cache)
        assert (cache.graph is None) == (len(rows) != 3)
        torch.testing.assert_close(steps(model, cache, ids[rows, 20:], [4]), whole[rows], atol=1e-5, rtol=1e-5)


def test_beam_search_and_assisted_decoding_go_on_from_a_cache_of_ours(make):
    """What transformers reorders, in a cache that holds the start of the prompt already, and takes back."""
    ids, mask, beams, assisted = tokens(1, 14), torch.ones(1, 14, dtype=torch.long), [], []
    for seed in range(3):
        found = {}
        for model in (enable_kernels(make(seed=seed), "reference"), make(seed=seed)):
            for kind, rows, options in (
                (beams, 3, {"num_beams": 3}),
                (assisted, 1, {"prompt_lookup_num_tokens": 3}),
            ):
                cache = a_cache(model)
                if rows > 1:
                    steps(model, cache, ids[:, :13].repeat(rows, 1), [13])
                options |= {"max_new_tokens": 8, "do_sample": False, cache_name(model): cache}
                found.setdefault(id(kind), []).append(model.generate(ids, attention_mask=mask, **options))
        for kind in (beams, assisted):
            kind.append(torch.equal(*found[id(kind)]))
    assert sum(beams) >= 2
    assert sum(assisted) >= 2


def test_a_prefix_is_used_again_and_turns_follow_each_other(make):
    """As transformers' documentation has it: the cache of a prefix, copied for each of several continuations."""
    prefix, pairs = tokens(2, 100), []
    for seed in range(3):
        found = []
        for model in (enable_kernels(make(seed=seed), "reference"), make(seed=seed)):
            kept = a_cache(model)
            steps(model, kept, prefix, [100])
            for end in (7, 9):
                ids = torch.cat([prefix, torch.full((2, 5), end)], 1)
                cache = copy.deepcopy(kept)
                first = generate(model, ids, torch.ones_like(ids), 4, **{cache_name(model): cache})
                again = torch.cat([first.sequences, torch.full((2, 3), 11)], 1)
                found.append(generate(model, again, torch.ones_like(again), 25, **{cache_name(model): cache}))
            assert kept.get_seq_length() == 100
            assert cache.get_seq_length() == 100 + 5 + 4 + 3 + 24
        pairs += zip(found[:2], found[2:], strict=True)
    same = [torch.equal(a.sequences, b.sequences) for a, b in pairs]
    assert sum(same) > len(pairs) / 2


def test_a_padded_batch_goes_on_where_its_first_turn_ended(make):
    (ids, mask), pairs = prompts(), []
    for seed in range(3):
        turns = []
        for model in (enable_kernels(make(seed=seed), "reference"), make(seed=seed)):
            first = generate(model, ids, mask, 5)
            cache = first.get("past_key_values", first.get("cache"))
            again = torch.cat([first.sequences, tokens(2, 6)], 1)
            longer = torch.cat([mask, torch.ones(2, again.shape[1] - 13, dtype=mask.dtype)], 1)
            turns.append(generate(model, again, longer, 5, **{cache_name(model): cache}))
        pairs.append(turns)
    assert alike(pairs)


def test_plain_calls_take_the_fast_path_unless_somebody_needs_the_modules(make, monkeypatch):
    (ids, mask), model, plain = prompts(), enable_kernels(make(), "reference"), make()
    calls, run = [], model.fused.prompt
    monkeypatch.setattr(model.fused, "prompt", lambda *a, **k: calls.append(1) or run(*a, **k))

    def fast(**arguments):
        calls.clear()
        arguments = {"input_ids": ids} | arguments
        out, want = model(**arguments), plain(**arguments)
        real = arguments.get("attention_mask", torch.ones_like(mask)).bool()[:, -out.logits.shape[1] :]
        got, want_logits = out.logits.detach()[real], want.logits.detach()[real]
        assert float((got - want_logits).norm() / want_logits.norm()) < 0.05  # a tie may fall to either side
        assert (out.get(cache_name(model)) is None) == (want.get(cache_name(plain)) is None)
        return bool(calls)

    right, positions = mask.flip(-1), (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = {"output_hidden_states": True}
    assert not fast()  # with gradients
    with torch.no_grad():
        assert fast()
        assert fast(use_cache=False)
        assert fast(attention_mask=torch.ones_like(mask), logits_to_keep=3)
        assert fast(attention_mask=mask, position_ids=positions)
        assert not fast(attention_mask=mask)  # transformers' positions count the padding
        assert fast(attention_mask=right, use_cache=False)
        assert not fast(attention_mask=right)
        for given in (hidden, {"labels": ids}, {"position_ids": torch.arange(13)[None] + 3}):
            assert not fast(**given)
        assert fast()  # what transformers hooks for hidden states stays, and sleeps
        model.train(), plain.train()
        assert not fast()
        model.eval(), plain.eval()
        seen = []
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        assert not fast()
        assert seen
        handle.remove()
        assert fast(inputs_embeds=model.get_input_embeddings()(ids), input_ids=None)
        for form in ({"return_dict": False}, {"return_dict": False, **hidden}):
            out = model(ids, **form)
            assert isinstance(out, tuple)
            torch.testing.assert_close(out[0], plain(ids).logits, atol=1e-2, rtol=1e-2)


def test_a_cache_of_inference_mode_goes_on_outside_of_it(make):
    model, ids = enable_kernels(make(), "reference"), tokens(1, 150)
    cache = FusedCache(8)
    with torch.inference_mode():
        model(ids[:, :100], **{cache_name(model): cache})
    got = steps(model, cache, ids[:, 100:], [1, 48, 1])
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-1)
    torch.testing.assert_close(got, steps(model, FusedCache(8), ids, [100, 1, 48, 1])[:, 100:])
    cache = FusedCache(8)
    with torch.inference_mode():
        model(ids[:, :100], **{cache_name(model): cache})
        copied = copy.deepcopy(cache)
    torch.testing.assert_close(got, steps(model, copied, ids[:, 100:], [1, 48, 1]))


def test_a_step_captured_in_inference_mode_is_replayed_outside_of_it(make, monkeypatch):
    """Without a GPU: nothing is captured, but tokens are handed over as they are to a graph."""
    model, ids = enable_kernels(make(), "reference"), tokens(1, 24)
    replays = []

    class Graph:
        def replay(self):
            replays.append(cache.graph.inputs[0].clone())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("device", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "capture_stream", lambda _: None)
    model.fused.graphs, cache = True, FusedCache(64)
    with torch.inference_mode():
        steps(model, cache, ids[:, :22], [20, 1, 1])
    assert steps(model, cache, ids[:, 22:], [1, 1]).shape == (1, 2, 96)
    assert torch.equal(torch.cat(replays, 1), ids[:, 21:])


def test_a_call_with_gradients_on_a_cache_computes_without(make):
    model, ids = enable_kernels(make(), "reference"), tokens(1, 20)
    cache = FusedCache(64)
    steps(model, cache, ids[:, :18], [18])
    assert not model(ids[:, 18:19], **{cache_name(model): cache}).logits.requires_grad
    assert not model(ids[:, 19:], **{cache_name(model): cache}).logits.requires_grad


def test_generation_with_a_static_cache_runs_the_modules(make):
    (ids, mask), pairs = prompts(), []
    for seed in range(3):
        pairs.append(
            [
                generate(m, ids, mask, 5, cache_implementation="static")
                for m in (enable_kernels(make(seed=seed), "reference"), make(seed=seed))
            ]
        )
        assert isinstance(pairs[-1][0].get("past_key_values", pairs[-1][0].get("cache")), StaticCache)
    assert alike(pairs)


def test_a_model_on_the_kernels_compiles_as_its_modules_do(make):
    """One graph, without a break, of the forward pass of a whole sequence."""
    ids = tokens(2, 13)
    found = []
    for model in (enable_kernels(make(kv=False), "reference"), make(kv=False)):
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
            got = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        assert float((got - want).norm() / want.norm()) < 0.05
        found.append(got)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05


def test_parts_of_a_model_on_the_kernels_are_neither_moved_nor_copied_nor_stored(make):
    model = enable_kernels(make(), "reference")
    for part in (model, model.model, model.model.layers[1], model.model.layers[0].mlp.up_proj):
        for change in (lambda x: x.to(torch.float16), lambda x: x.to("meta"), copy.deepcopy, lambda x: x.state_dict()):
            with pytest.raises(ValueError, match=r"kernels.*\n  where: .*\n  next:  load it again"):
                change(part)
    with pytest.raises(ValueError, match="no state dict"):
        model.load_state_dict({}, strict=False)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_cache_grows_and_its_step_is_captured_anew(make):
    """Beside the same steps without graphs, to the bit, and on a cache that was large enough from the start."""
    model = enable_kernels(make(dtype=torch.bfloat16).to("cuda"), "triton")
    ids = tokens(2, 290).to("cuda")
    chunks = [100, *[1] * 190]
    small, large = FusedCache(8), FusedCache(400)
    got, graph = steps(model, small, ids, chunks), small.graph
    assert graph is not None
    assert small.store.capacity == 512
    model.fused.graphs = False
    assert torch.equal(got, steps(model, FusedCache(8), ids, chunks))
    want = steps(model, large, ids, chunks)
    assert large.graph is None
    assert float((got - want).float().norm() / want.float().norm()) < 0.1  # other cuts; FP8 has ties
    model.fused.graphs = True
    whole = generate(model, ids[:, :20], torch.ones_like(ids[:, :20]), 150)  # beyond what a plain call reserves
    assert whole.sequences.shape == (2, 170)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        model(ids[:, :1], **{cache_name(model): FusedCache(8)})


# ---- on a GPU

ON_GPU = {
    "llama": {},
    "mistral, a short sliding window": {"family": "mistral"},
    "qwen2, biases, zero points": {"family": "qwen2", "zeros": True},
    "qwen3, norms on heads": {"family": "qwen3"},
    "no window": {"window": 0, "post_rope": True, "shape": False},
    "16-bit cache": {"kv": False},
}


def on_gpu(model):
    """The model there and on its kernels, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return on_kernels(model.cuda())


class OneByOne(TorchDispatchMode):
    """Every operation ends before the next begins, so that no kernel overlaps another operation's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        torch.cuda.synchronize()
        return out


def replays_what_steps_do(fused, ids, start):
    """Prompt, and then replays of a graph (captured while another stream was current) beside steps one by one."""
    stores = [fused.empty_store(len(ids), ids.shape[1] + 30) for _ in range(2)]
    with torch.inference_mode():
        for store in stores:
            store.start.copy_(start)
            fused.prompt(fused.model.model.embed_tokens(ids), store)
            fused.step(ids[:, :1], store)
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = StepGraph(functools.partial(fused.step, store=stores[0]), ids[:, :1])
        torch.cuda.synchronize()
        for i in range(1, 13):
            with OneByOne():
                want = fused.step(ids[:, i : i + 1], stores[1])
            torch.testing.assert_close(graph(ids[:, i : i + 1]), want)
    for name in ("codes", "meta", "recent", "length", "arrivals"):
        assert torch.equal(getattr(stores[0], name), getattr(stores[1], name)), name
    assert int(stores[0].length) == ids.shape[1] + 13


@needs_gpu
@pytest.mark.parametrize("variant", ON_GPU)
def test_a_replayed_step_does_what_a_step_does(make, variant):
    """To the bit, in the cache of every layer."""
    fused = on_gpu(make(dtype=torch.bfloat16, **ON_GPU[variant])).fused
    replays_what_steps_do(fused, prompts()[0].cuda(), torch.tensor([0, 4]))


@needs_gpu
@pytest.mark.parametrize("rows", [1, 9])
def test_kernels_that_overlap_at_full_width_do_the_same(rows):
    config = shape_config("llama-3-8b") | {"num_hidden_layers": 3, "vocab_size": 1024}
    fused = on_gpu(random_model(config, int4=True, dtype=torch.bfloat16, device="cuda")).fused
    ids = torch.randint(0, 1024, (rows, 400), generator=torch.Generator().manual_seed(1)).cuda()
    replays_what_steps_do(fused, ids, torch.arange(rows) * 7)


@needs_gpu
def test_generation_replays_a_graph_and_gives_the_same_each_time(make):
    model = on_gpu(make(dtype=torch.bfloat16))
    ids, mask = (x.cuda() for x in prompts())
    found = [generate(model, ids, mask) for _ in range(2)]
    model.fused.graphs = False
    found.append(generate(model, ids, mask))
    caches = [x.get("past_key_values", x.get("cache")) for x in found]
    assert [x.graph is not None for x in caches] == [True, True, False]
    for other in found[1:]:
        assert torch.equal(found[0].sequences, other.sequences)
        torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(other.logits))


@needs_gpu
def test_a_cache_is_used_again_with_its_graph(make):
    model = on_gpu(make(dtype=torch.bfloat16))
    cache, ids, found = FusedCache(64), prompts()[0].cuda(), []
    with torch.inference_mode():
        for _ in range(2):
            cache.reset()
            model(ids, **{cache_name(model): cache})
            found.append([model(ids[:, i : i + 1], **{cache_name(model): cache}).logits for i in range(5)])
    assert cache.graph is not None
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_card_than_the_current_one(make):
    ids, mask = prompts()
    found = []
    for card in ("cuda:0", "cuda:1"):
        model = on_kernels(make(dtype=torch.bfloat16).to(card))
        found.append(generate(model, ids.to(card), mask.to(card)))
    assert torch.cuda.current_device() == 0
    assert torch.equal(found[0].sequences.cpu(), found[1].sequences.cpu())


@needs_gpu
def test_an_assistant_on_the_kernels_takes_tokens_back_on_a_gpu(make):
    ids, model = prompts(1)[0].cuda(), make().cuda()
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    assistant = on_gpu(make(dtype=torch.bfloat16, seed=1))
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=6, assistant_model=assistant), want)


@needs_gpu
def test_gradients_on_a_gpu_are_those_of_dequantized_weights(make):
    """And a call that wants them does not take the fast path, whose operations have none."""
    plain, model = make().cuda(), enable_kernels(make().cuda(), "reference")
    found = []
    for m in (plain, model):
        x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(2)).cuda().requires_grad_()
        m(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.1  # numbers beside a tie of FP8
    model, cache = on_gpu(make(dtype=torch.bfloat16)), FusedCache(64)
    model(prompts()[0].cuda(), **{cache_name(model): cache})
    assert isinstance(cache.delegate, DynamicCache)


@needs_gpu
def test_a_model_on_the_kernels_stays_on_its_gpu(make):
    model = on_gpu(make(dtype=torch.bfloat16))
    ids, mask = (x.cuda() for x in prompts())
    before = generate(model, ids, mask)
    for move in (model.cpu, lambda: model.to("cpu"), model.float, model.half):
        with pytest.raises(ValueError, match=r"kit\.load"):
            move()
    assert model.cuda() is model
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert torch.equal(generate(model, ids, mask).sequences, before.sequences)


@needs_gpu
def test_an_older_gpu_keeps_the_modules_with_one_warning(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    accelerated._warn_once.cache_clear()
    model = make(dtype=torch.bfloat16).cuda()
    with pytest.warns(UserWarning, match="Hopper"):
        assert on_kernels(model) is model
    assert getattr(model, "fused", None) is None
    assert getattr(on_gpu(make(dtype=torch.bfloat16)), "fused", None) is None
    ids, mask = (x.cuda() for x in prompts())
    assert torch.stack(generate(model, ids, mask).logits).isfinite().all()
