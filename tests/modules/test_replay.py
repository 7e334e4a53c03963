"""Replayed steps of linearized models: the same bits as without graphs, whatever happens between two steps.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), and in a graph's place stands what captures
and replays as one does: a capture runs nothing, a replay changes tensors and nothing on the host.
"""

import copy
import gc
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

pytest.importorskip("triton")

from kit.kernels.linear_attention.decode_ops import HybridState, gated_step, hybrid_step
from kit.kernels.linear_attention.dispatch import StepOps
from kit.modules import decoding, linear_attention, modeling, replay
from kit.modules.cache import cache_argument
from kit.modules.linear_attention import Mixer, branch_weights

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
pytestmark = pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
STEPS = StepOps(hybrid_step, gated_step, HybridState)
SINGLES, LAYERS, KV_HEADS = (40, 2, 2) if GPU else (5, 1, 1)  # the interpreter is slow
PLAIN = replay.PLAIN_STEPS + 1  # the first one moves the cache
KINDS = {
    "window": {"mixers": ["window"] * LAYERS, "num_sinks": 2},
    "hybrid": {"mixers": ["hybrid"] * LAYERS, "num_sinks": 2},
    "linear": {"mixers": ["linear"] * LAYERS},
    "gated": {"mixers": ["gated"] * LAYERS, "num_sinks": 2},
    "full": {"mixers": ["hybrid", "full"]},
}
EXTRA = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "gemma2": {"attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
}


def make(kind="hybrid", family="llama", **extra):
    section = KINDS[kind] | {"feature_dim": 16, "window_size": 4}
    layers = [{"full": "full_attention"}.get(mixer, "hybrid_sliding") for mixer in section["mixers"]]
    if family != "gpt2":
        extra |= {"intermediate_size": 64, "num_key_value_heads": KV_HEADS, "head_dim": 32}
    config = getattr(modeling, f"Kit{modeling.FAMILIES[family]}Config")(
        hidden_size=64 * KV_HEADS,
        num_hidden_layers=len(layers),
        num_attention_heads=2 * KV_HEADS,
        vocab_size=97,
        max_position_embeddings=512,
        sliding_window=2 if kind == "linear" else 4,
        layer_types=layers,
        linear_attention=section,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="kit_linear",
        **EXTRA.get(family, {}) | extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():  # spread the weights, so that attention is far from uniform
        if isinstance(module, torch.nn.Linear | Conv1D):
            torch.nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, Mixer):
            for name, parameter in module.named_parameters():
                torch.nn.init.normal_(parameter, std=0.3 if "gate" in name else 1.0)
    return model.to(DEVICE, DTYPE)


class Graphs:
    """What has been captured and replayed."""

    def __init__(self):
        self.captured = self.replayed = 0


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    counts, caches, real = Graphs(), [], replay.StepGraph

    class Counted(real):
        def __init__(self, run, *inputs):
            counts.captured += 1
            if GPU:
                super().__init__(run, *inputs)
                return
            self.cache, self.run = caches[-1], run
            with torch.inference_mode(False):
                self.inputs = [x.clone() for x in inputs]
            tensors = [x for layer in self.cache.layers for x in replay._tensors(layer) if x is not None]
            before = [x.clone() for x in tensors]
            run(*self.inputs)
            for x, was in zip(tensors, before, strict=True):
                x.copy_(was)

        def __call__(self, *inputs):
            counts.replayed += 1
            if GPU:
                return super().__call__(*inputs)
            for held, x in zip(self.inputs, inputs, strict=True):
                held.copy_(x)
            lengths = [layer.cumulative_length for layer in self.cache.layers]
            out = self.run(*self.inputs)
            for layer, length in zip(self.cache.layers, lengths, strict=True):
                layer.cumulative_length = length
            return out.clone()

    class Watched(replay.Replay):
        def __init__(self, model, cache, *rest):
            caches.append(cache)
            super().__init__(model, cache, *rest)
            caches.clear()

    monkeypatch.setattr(replay, "StepGraph", Counted)
    monkeypatch.setattr(replay, "Replay", Watched)
    if not GPU:
        monkeypatch.setattr(replay, "on_cuda", lambda x: True)
        for module in (decoding, linear_attention):
            monkeypatch.setattr(module, "step_ops", lambda v: STEPS)
    with torch.no_grad():
        yield counts


@pytest.fixture
def plain(monkeypatch):
    """Calls a function where nothing is captured."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(replay, "PLAIN_STEPS", 10**9)
            return function(*args, **kwargs)

    return call


def tokens(length, batch=2):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


def padded(length):
    ids = tokens(length, 3)
    mask = (torch.arange(length) >= torch.tensor([0, 5, 2])[:, None]).long().to(DEVICE)
    return ids * mask, mask


def cache_of(model):
    return DynamicCache(config=model.config)


def run(model, ids, sizes, cache, mask=None, at=0):
    """Logits of chunks, on from column `at`, and the cache."""
    out = []
    for size in sizes:
        seen = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        out.append(model(ids[:, at : at + size], past_key_values=cache, **seen).logits)
        at += size
    return torch.cat(out, 1), cache


def same(got, want):
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1].layers, want[1].layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        assert all(x is y or torch.equal(x, y) for x, y in zip((a.keys, a.values), (b.keys, b.values), strict=True))
        if hasattr(a, "recurrent_states") and a.recurrent_states[0] is not None:
            assert torch.equal(a.recurrent_states[0], b.recurrent_states[0])


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("kind", ["window", "hybrid", "linear", "gated"])
def test_replays_give_the_bits_of_steps(kind, with_padding, graphs, plain):
    model, sizes = make(kind), [9, *[1] * SINGLES]
    ids, mask = padded(sum(sizes)) if with_padding else (tokens(sum(sizes)), None)
    want = plain(run, model, ids, sizes, cache_of(model), mask)
    assert (graphs.captured, graphs.replayed) == (0, 0)
    same(run(model, ids, sizes, cache_of(model), mask), want)
    assert (graphs.captured, graphs.replayed) == (1, SINGLES - PLAIN + 1)


@needs_gpu
@pytest.mark.parametrize("family", sorted(modeling.FAMILIES))
def test_every_family_is_replayed(family, graphs, plain):
    model, sizes = make(family=family), [9, *[1] * 20]
    (ids, mask), more = padded(sum(sizes)), tokens(sum(sizes))
    for given in ((ids, mask), (more, None)):
        want = plain(run, model, given[0], sizes, cache_of(model), given[1])
        same(run(model, given[0], sizes, cache_of(model), given[1]), want)
    assert graphs.captured == (0 if family == "gemma2" else 2)  # whose scores have a cap


def test_two_caches_take_turns(graphs, plain):
    model = make()
    ids, more = tokens(16), tokens(17)
    want = [plain(run, model, x, [9, *[1] * 5], cache_of(model)) for x in (ids, more)]
    caches = [run(model, x, [9], cache_of(model))[1] for x in (ids, more)]
    out = [[], []]
    for step in range(5):
        for i, x in enumerate((ids, more)):
            out[i].append(run(model, x, [1], caches[i], at=9 + step)[0])
    for i in range(2):
        same((torch.cat(out[i], 1), caches[i]), (want[i][0][:, 9:], want[i][1]))
    assert (graphs.captured, graphs.replayed) == (2, 2 * (5 - PLAIN + 1))


@pytest.mark.parametrize("kind", ["hybrid", pytest.param("gated", marks=needs_gpu)])
def test_what_moves_the_cache_is_noticed(kind, graphs, plain):
    model, ids = make(kind), tokens(40)
    order = torch.tensor([1, 0], device=DEVICE)

    def several():
        cache = run(model, ids, [9, *[1] * 4], cache_of(model))[1]
        cache.reorder_cache(order)
        out = [run(model, ids[order], [*[1] * 4], cache, at=13)[0]]
        copied = copy.deepcopy(cache)
        out.append(run(model, ids, [1] * 4, copied, at=17)[0])
        out.append(run(model, ids[order], [1, 5, *[1] * 4], cache, at=17)[0])
        cache.reorder_cache(torch.tensor([0, 1, 1], device=DEVICE))  # more rows
        out.append(run(model, ids[[0, 1, 1]], [1] * 4, cache, at=27)[0].flatten(0, 1)[None])
        copied.reset()
        out.append(run(model, ids, [6, *[1] * 4], copied)[0])
        return torch.cat([x.reshape(-1, 97) for x in out]), cache

    want = plain(several)
    same(several(), want)
    assert (graphs.captured, graphs.replayed) == (6, 2 + 2 + 3 + 3 + 2 + 2)  # a copy is in ring form at once


def test_generation_is_that_without_graphs(graphs, plain):
    model, (ids, mask) = make(), padded(11)
    options = [{"max_new_tokens": 6}, {"max_new_tokens": 6, "do_sample": True}, {"max_new_tokens": 5, "num_beams": 2}]

    def generate(options):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, **{"do_sample": False, **options})

    for number, given in enumerate(options):
        want = plain(generate, given)
        captured = graphs.captured
        for _ in range(2):
            assert torch.equal(generate(given), want)
        assert graphs.captured - captured == (0 if number == 2 else 2)  # beams move the cache every step


def test_what_a_graph_would_not_see_runs_as_it_is(graphs):
    model, ids = make(), tokens(30)
    cache, layer = run(model, ids, [9, *[1] * 4], cache_of(model))[1], model.model.layers[-1]
    assert (graphs.captured, graphs.replayed) == (1, 2)
    assert (
        len(model(ids[:, :1], past_key_values=copy.deepcopy(cache), output_hidden_states=True).hidden_states)
        == LAYERS + 1
    )
    calls = []

    def goes_on(at, *, replayed):
        before = graphs.replayed
        run(model, ids, [1], cache, at=at)
        assert graphs.replayed - before == replayed

    goes_on(13, replayed=1)
    handle = layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    run(model, ids, [1] * 4, cache, at=14)
    handle.remove()
    assert len(calls) == 4
    run(model, ids, [1] * 3, cache, at=18)
    goes_on(21, replayed=1)
    with branch_weights(model, 0, 1):
        goes_on(22, replayed=0)
    run(model, ids, [1] * 3, cache, at=23)
    goes_on(26, replayed=1)
    layer.train()
    goes_on(27, replayed=0)


def test_other_weights_are_noticed(graphs, plain):
    model, ids = make(), tokens(24)
    norm, mlp = model.model.layers[0].input_layernorm, model.model.layers[-1].mlp
    changes = [
        lambda: norm.weight.mul_(0.5),  # where it was: a graph sees it
        lambda: setattr(norm, "weight", torch.nn.Parameter(norm.weight * 3)),
        lambda: setattr(mlp, "up_proj", torch.nn.Linear(64 * KV_HEADS, 64, False, DEVICE, DTYPE).eval()),
        lambda: setattr(norm.weight, "data", norm.weight.data * 0.3),
    ]
    for change in changes:
        cache = run(model, ids, [5, *[1] * 3], cache_of(model))[1]
        other, before = copy.deepcopy(cache), graphs.replayed
        change()
        same(run(model, ids, [1] * 4, cache, at=8), plain(run, model, ids, [1] * 4, other, at=8))
        assert graphs.replayed > before


def test_a_model_with_a_layer_kept_full_runs_as_it_is(graphs):
    model, ids = make("full"), tokens(16)
    run(model, ids, [9, *[1] * 6], cache_of(model))
    assert graphs.captured == 0


class Foreign(torch.nn.Module):
    """Of a package that may read on the host what it has computed."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * float(x.isfinite().all())


class Foreigner(torch.Tensor):
    """A weight of another kind."""


def test_what_others_put_into_a_model_runs_as_it_is(graphs):
    model, ids = make(), tokens(16)
    mlp = model.model.layers[-1].mlp
    model.model.layers[-1].mlp = Foreign(mlp).eval()
    run(model, ids, [9, *[1] * 4], cache_of(model))
    model.model.layers[-1].mlp = mlp
    model.model.register_buffer("more", torch.ones(1, device=DEVICE).as_subclass(Foreigner), persistent=False)
    run(model, ids, [9, *[1] * 4], cache_of(model))
    assert graphs.captured == 0
    del model.model.more
    run(model, ids, [9, *[1] * 4], cache_of(model))
    assert graphs.captured == 1


def test_a_hole_that_a_later_mask_has_is_seen(graphs, plain):
    model, ids = make(), tokens(16)
    whole = torch.ones(2, 16, dtype=torch.long, device=DEVICE)
    cache = run(model, ids, [9, *[1] * 5], cache_of(model), whole)[1]
    assert graphs.replayed
    whole[1, 11] = 0
    other = copy.deepcopy(cache)
    same(run(model, ids, [1], cache, whole, at=14), plain(run, model, ids, [1], other, whole, at=14))
    assert not any(decoding.in_ring_form(layer) for layer in cache.layers)


def test_a_step_captured_in_inference_mode_is_replayed_outside_of_it(graphs, plain):
    model, ids = make(), tokens(20)
    want = plain(run, model, ids, [9, *[1] * 10], cache_of(model))
    cache = cache_of(model)
    with torch.inference_mode():
        first = run(model, ids, [9, *[1] * 5], cache)[0]
    same((torch.cat([first, run(model, ids, [1] * 5, cache, at=14)[0]], 1), cache), want)
    assert graphs.captured == 1


def test_a_failed_capture_leaves_steps_as_they_are(plain, monkeypatch):
    model, ids = make(), tokens(20)
    sizes, tries = [10, *[1] * (PLAIN + 3)], []
    want = plain(run, model, ids, sizes, cache_of(model))

    def fail(*_):
        tries.append(1)
        raise RuntimeError("not permitted")

    monkeypatch.setattr(replay, "StepGraph", fail)
    with pytest.warns(UserWarning, match="not permitted"):
        same(run(model, ids, sizes, cache_of(model)), want)
    assert len(tries) == 1


def test_it_can_be_turned_off(graphs):
    model, ids = make(), tokens(20)
    model.base_model.replay_steps = False
    run(model, ids, [10, *[1] * (PLAIN + 3)], cache_of(model))
    assert not graphs.captured


def test_the_base_model_alone_names_the_cache_as_usual(graphs):
    model, ids = make().model, tokens(16)
    cache, found = DynamicCache(config=model.config), []
    for at, size in ((0, 9), *((9 + i, 1) for i in range(6))):
        found.append(model(ids[:, at : at + size], past_key_values=cache))
    assert graphs.replayed
    assert found[-1].keys() == found[1].keys()
    assert type(found[-1]) is type(found[1])
    assert found[-1][cache_argument(found[-1])] is cache
    assert isinstance(model(ids[:, :1], past_key_values=cache, return_dict=False), tuple)


@needs_gpu
def test_memory_goes_with_the_cache_and_the_model_with_itself():
    model, ids = make(), tokens(16)
    run(model, ids, [9, *[1] * 6], cache_of(model))  # cuBLAS takes its workspace once
    gc.collect()
    gc.disable()
    try:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            out, cache = run(model, ids, [9, *[1] * 6], cache_of(model))
            assert cache.kit_steps.replay is not None
            del out, cache
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == before
        _, cache = run(model, ids, [9, *[1] * 6], cache_of(model))
        layer = weakref.ref(model.model.layers[0])
    finally:
        gc.enable()
    del model
    gc.collect()
    assert layer() is None
    assert cache.kit_steps.replay.parts() is None


@needs_gpu
def test_another_current_stream_and_a_capture_around_it(graphs, plain):
    model, ids = make(), tokens(20)
    want = plain(run, model, ids, [9, *[1] * 8], cache_of(model))
    with torch.cuda.stream(torch.cuda.Stream()):
        got = run(model, ids, [9, *[1] * 8], cache_of(model))
        torch.cuda.synchronize()
    same(got, want)
    assert graphs.captured == 1
    cache, graph, token = got[1], torch.cuda.CUDAGraph(), ids[:, :1].clone()
    with torch.cuda.graph(graph):
        model(token, past_key_values=cache)
        model(ids[:, :2], past_key_values=cache)
    assert cache.kit_steps.replay is not None  # freed, it would have ended the capture


def test_rows_of_other_lengths(graphs, plain):
    """Left padding, where one row has a single token and another is full."""
    model, ids = make("gated"), tokens(17, 2)
    mask = F.pad(torch.zeros(1, 8, dtype=torch.long), (0, 9), value=1).to(DEVICE)
    mask = torch.cat([mask, torch.ones_like(mask)])
    want = plain(run, model, ids, [9, *[1] * 8], cache_of(model), mask)
    same(run(model, ids, [9, *[1] * 8], cache_of(model), mask), want)
    assert graphs.captured == 1
