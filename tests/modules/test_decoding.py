"""Single tokens on the one-launch kernels: the same logits as whole sequences, whatever happens to the cache between.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), in fp32.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

pytest.importorskip("triton")

from kit.kernels.linear_attention.decode_ops import HybridState, gated_step, hybrid_step
from kit.kernels.linear_attention.dispatch import StepOps
from kit.modules import decoding, linear_attention, modeling, replay
from kit.modules.linear_attention import ABLATIONS, Mixer, branch_weights

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter")
CLOSE = {"atol": 1e-3, "rtol": 1e-3} if GPU else {"atol": 1e-4, "rtol": 1e-4}
STEPS = StepOps(hybrid_step, gated_step, HybridState)
WINDOW, SINKS = 4, 2
KINDS = {
    "window": {"mixers": ["window"], "num_sinks": SINKS},
    "window without sinks": {"mixers": ["window"]},
    "hybrid": {"mixers": ["hybrid"]},
    "hybrid with sinks": {"mixers": ["hybrid"], "num_sinks": SINKS},
    "linear": {"mixers": ["linear"]},
    "gated": {"mixers": ["gated"], "num_sinks": SINKS},
    "gated with RoPE": {"mixers": ["gated"], "window_rope": True},
    "a map a query head": {"mixers": ["hybrid", "gated"], "num_sinks": SINKS, "feature_map_heads": "query"},
    "mixed": {"mixers": ["full", "hybrid", "window", "full"], "num_sinks": SINKS},
}


def make(kind, cached=None):
    section = {"feature_dim": 16, "window_size": WINDOW} | KINDS[kind]
    layers = [{"full": "full_attention"}.get(mixer, "hybrid_sliding") for mixer in section["mixers"]]
    config = modeling.KitLlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=97,
        max_position_embeddings=512,
        sliding_window=cached or (2 if "linear" in section["mixers"] else WINDOW),
        layer_types=layers,
        linear_attention=section,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="kit_linear",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():  # spread the weights, so that attention is far from uniform
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, Mixer):
            for name, parameter in module.named_parameters():
                torch.nn.init.normal_(parameter, std=0.3 if "gate" in name else 1.0)
    return model.to(DEVICE)


def tokens(length, batch=2):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Takes the kernels in fp32 too, and on CPUs; counts the layers' steps on them."""
    steps, decode = [], decoding.DecodingSlot.update

    def update(slot, *args, **kwargs):
        steps.append(slot)
        return decode(slot, *args, **kwargs)

    for module in (decoding, linear_attention):
        monkeypatch.setattr(module, "step_ops", lambda v: STEPS)
    monkeypatch.setattr(decoding.DecodingSlot, "update", update)
    monkeypatch.setattr(replay, "PLAIN_STEPS", 10**9)  # what is replayed is not counted
    with torch.no_grad():
        yield steps


def cache_of(model):
    return DynamicCache(config=model.config)


def run(model, ids, sizes, cache, mask=None):
    out, at = [], 0
    for size in sizes:
        seen = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        out.append(model(ids[:, at : at + size], past_key_values=cache, **seen).logits)
        at += size
    return torch.cat(out, 1)


def ours(model):
    return sum(layer.self_attn.linear_attention is not None for layer in model.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole_with_chunks_between(kind, kernels):
    model, ids = make(kind), tokens(21, 1 if kind == "mixed" else 2)
    want = model(ids, use_cache=False).logits
    for sizes in ([1, 1], [3, 1, 3, 1, 9, 1, 1, 2]):
        kernels.clear()
        got = run(model, ids, sizes, cache_of(model))
        torch.testing.assert_close(got, want[:, : sum(sizes)], **CLOSE)
        singles = sum(size == 1 for size in sizes) - (sizes[0] == 1)  # the first token makes the cache
        assert len(kernels) == singles * ours(model)


@pytest.mark.parametrize("kind", ["window", "hybrid with sinks", "linear", "gated with RoPE", "a map a query head"])
def test_left_padding_changes_no_real_position(kind, kernels):
    model = make(kind)
    rows = [tokens(n, 1)[0] for n in (1, 4, 21)]
    padded = torch.stack([F.pad(row, (21 - len(row), 0)) for row in rows])
    mask = (padded != 0).long()
    more, real = torch.cat([padded, tokens(8, 3)], 1), F.pad(mask, (0, 8), value=1)
    got = run(model, more, [20, 1, 1, 1, 3, 1, 1, 1], cache_of(model), real)
    for row, out, pads in zip(more, got, 21 - mask.sum(1), strict=True):
        torch.testing.assert_close(out[pads:], model(row[None, pads:]).logits[0], **CLOSE)
    assert len(kernels) == 6 * ours(model)


@pytest.mark.parametrize("kind", ["hybrid with sinks", "gated"])
def test_rows_in_another_order_copies_and_resets(kind, kernels):
    model, ids = make(kind), tokens(20)
    want = model(ids, use_cache=False).logits
    cache, order = cache_of(model), torch.tensor([1, 0], device=DEVICE)
    run(model, ids[:, :12], [10, 1, 1], cache)
    other = copy.deepcopy(cache)
    kernels.clear()
    cache.reorder_cache(order)
    torch.testing.assert_close(run(model, ids[order, 12:], [1, 1, 5, 1], cache), want[order, 12:], **CLOSE)
    torch.testing.assert_close(run(model, ids[:, 12:], [1, 1, 1, 5], other), want[:, 12:], **CLOSE)
    run(model, ids[:, :1], [1], other)  # in ring form again
    other.reset()
    torch.testing.assert_close(run(model, ids, [9, 1, 10], other), want, **CLOSE)
    assert len(kernels) == ours(model) * 8


@pytest.mark.parametrize(
    ("sizes", "rows", "move"),
    [
        ([7, 1], 2, lambda cache: cache.batch_select_indices(torch.tensor([1, 0]))),
        ([7, 1], 1, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([8], 4, lambda cache: cache.batch_repeat_interleave(2)),
    ],
)
def test_keys_that_moved_without_the_state_are_refused(sizes, rows, move):
    model, ids = make("hybrid with sinks"), tokens(9)
    cache = cache_of(model)
    run(model, ids, sizes, cache)
    move(cache)
    with pytest.raises(ValueError, match="reorder_cache"):
        model(ids[:1, 8:].expand(rows, -1), past_key_values=cache)


def test_rows_are_repeated_and_left_out_and_nothing_is_taken_back():
    model, ids = make("hybrid with sinks"), tokens(14)
    want = model(ids, use_cache=False).logits
    cache, rows = cache_of(model), torch.tensor([1, 0, 1], device=DEVICE)
    run(model, ids, [9, 1], cache)
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    cache.reorder_cache(rows)
    torch.testing.assert_close(run(model, ids[rows, 10:], [1, 2, 1], cache), want[rows, 10:], **CLOSE)


@pytest.mark.parametrize("kind", ["window without sinks", "hybrid with sinks", "linear", "gated"])
def test_nothing_moves_or_grows(kind, kernels):
    model, ids = make(kind), tokens(16, 1)
    cache = cache_of(model)
    run(model, ids[:, :10], [9, 1], cache)
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    where = lambda: [  # noqa: E731
        (x.data_ptr(), x.shape)
        for layer in layers
        for x in (layer.keys, layer.values, layer.recurrent_states[0])
        if x is not None
    ]
    before = where()
    got = run(model, ids[:, 10:], [1] * 6, cache)
    assert where() == before
    opts = next(m for m in model.modules() if isinstance(m, Mixer))
    assert layers[0].keys.shape[2] == (WINDOW + 1 + opts.num_sinks if opts.ring else 1)
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 10:], **CLOSE)


@pytest.mark.parametrize("kind", ["hybrid with sinks", "linear"])
def test_a_cache_that_keeps_more_than_the_layers_window(kind):
    model, ids = make(kind, cached=11), tokens(30, 1)
    want = model(ids, use_cache=False).logits
    got = run(model, ids, [5, 1, 1, 1, 8, 1, 10, 1, 1, 1], cache_of(model))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", ["hybrid with sinks", "gated"])
def test_generation_is_that_without_the_kernels(kind, kernels, monkeypatch):
    model, ids = make(kind), torch.cat([F.pad(tokens(8, 1), (3, 0)), tokens(11, 1)])
    mask = (ids != 0).long()
    options = [{"max_new_tokens": 4}, {"max_new_tokens": 3, "num_beams": 2}]
    got = [model.generate(ids, attention_mask=mask, do_sample=False, **o) for o in options]
    assert kernels
    kernels.clear()
    for module in (decoding, linear_attention):
        monkeypatch.setattr(module, "step_ops", lambda v: None)
    want = [model.generate(ids, attention_mask=mask, do_sample=False, **o) for o in options]
    assert not kernels
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_the_kernels_cannot_take_goes_the_other_way(kernels):
    model, ids = make("hybrid with sinks"), tokens(16)
    want = model(ids, use_cache=False).logits
    cache = cache_of(model)
    run(model, ids[:, :10], [8, 1, 1], cache)
    taken, other = len(kernels), copy.deepcopy(cache)
    with torch.enable_grad():
        got = [run(model, ids[:, 10:11], [1], cache).detach()]
    for variant in ABLATIONS.values():
        with branch_weights(model, *variant):
            run(model, ids[:, 10:11], [1], copy.deepcopy(other))
    mask = torch.ones(2, 11, dtype=torch.long, device=DEVICE)
    mask[0, 3] = 0  # padding between tokens
    model(ids[:, 10:11], attention_mask=mask, past_key_values=other)
    assert len(kernels) == taken
    got.append(run(model, ids[:, 11:], [1, 4], cache))
    assert len(kernels) == taken + ours(model)
    torch.testing.assert_close(torch.cat(got, 1), want[:, 10:], **CLOSE)


@pytest.mark.skipif(not GPU, reason="bf16 on a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_on_a_gpu_is_as_exact_as_the_other_path(kind, kernels, monkeypatch):
    monkeypatch.undo()
    model, ids = make(kind), tokens(40)
    want = model(ids, use_cache=False).logits[:, 20:]
    model.bfloat16()
    cache = cache_of(model)
    got = run(model, ids, [20, *[1] * 10, 5, *[1] * 5], cache)[:, 20:]
    assert any(decoding.in_ring_form(layer) for layer in cache.layers)
    monkeypatch.setattr(decoding, "step_ops", lambda v: None)
    other = run(model, ids, [20, *[1] * 10, 5, *[1] * 5], cache_of(model))[:, 20:]
    ours_off, other_off = ((x.float() - want).norm() / want.norm() for x in (got, other))
    assert ours_off < 1.5 * other_off + 1e-3


def test_it_takes_cuda_and_bf16_only(monkeypatch):
    monkeypatch.undo()
    model, ids = make("hybrid with sinks"), tokens(12)
    cache = cache_of(model)
    with torch.no_grad():
        run(model, ids, [10, 1, 1], cache)
    assert not any(decoding.in_ring_form(layer) for layer in cache.layers)


@pytest.mark.parametrize(
    ("window", "sinks", "takes"), [(511, 0, True), (508, 4, True), (512, 0, False), (509, 4, False)]
)
def test_windows_that_the_kernels_do_not_hold_take_the_other_path(window, sinks, takes, monkeypatch):
    """What `can_decode` lets through `hybrid_step` takes: 511 keys, of which the ring has one more."""
    monkeypatch.setitem(KINDS, "wide", {"mixers": ["window"], "num_sinks": sinks, "window_size": window})
    model, ids = make("wide", cached=window), tokens(12)
    cache = cache_of(model)
    with torch.no_grad():
        run(model, ids, [10, 1, 1], cache)
    assert decoding.in_ring_form(cache.layers[0]) == takes
