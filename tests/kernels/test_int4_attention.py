"""Attention over the INT4 cache: the specification against formulas, and the Triton kernels against the specification.

Without a GPU kernels run in Triton's interpreter, at small sizes; with one they are compiled, and larger cases run too.
"""

import math
import os

import pytest
import torch

from kit.kernels.int4_fp8 import attention, dequantize_kv, hadamard, quantize_kv, shaping_factor
from kit.kernels.int4_fp8 import attention_reference as reference
from kit.kernels.int4_fp8.attention import KVStore

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HAS_KERNELS = attention.kernels() is not None and (GPU or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no Triton, or no GPU and no interpreter")
needs_gpu = pytest.mark.skipif(not GPU, reason="full sizes need a GPU")
POSITIONS = 512


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written reads as NaN."""
    empty = torch.empty

    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() and out.element_size() > 1 else out

    monkeypatch.setattr(torch, "empty", fill)


def relative(got, want):
    size = want.double().norm()
    return float((got.double() - want.double()).norm() / size) if size > 0 else float(got.double().norm())


def angles(dim, positions=POSITIONS, dtype=torch.bfloat16):
    x = torch.arange(positions)[:, None] * 1e4 ** (-torch.arange(dim // 2) / (dim // 2))
    return x.cos().to(DEVICE, dtype), x.sin().to(DEVICE, dtype)


def heads_of(
    heads=4, kv_heads=2, dim=64, *, rotate=True, fp8=True, norm=False, center=True, scale=False, dtype=torch.bfloat16
):
    g = torch.Generator().manual_seed(3)
    r = lambda *s: torch.randn(*s, generator=g).to(DEVICE, dtype)  # noqa: E731
    return reference.Heads(
        heads, kv_heads, dim, q_norm=r(dim) if norm else None, k_norm=r(dim) if norm else None, eps=1e-6,
        key_mean=r(kv_heads, dim) if center else None,
        key_scale=(torch.rand(kv_heads, dim, generator=g) + 0.5).to(DEVICE, dtype) if scale else None,
        signs=(hadamard(dim) * dim**0.5).round().to(DEVICE, dtype) if rotate else None, query_fp8=fp8,
    )  # fmt: skip


def store_of(options, batch, capacity=128, *, window=16, symmetric=False, shape=False, int4=True, dtype=torch.bfloat16):
    order = factor = None
    g, d = options.kv_heads, options.dim
    if shape:
        m = torch.randn(2 * g, d, d, generator=torch.Generator().manual_seed(4))
        order, factor = shaping_factor(m @ m.transpose(1, 2))
        order, factor = order.view(1, 2, g, d).to(DEVICE), factor.view(1, 2, g, d, d).to(DEVICE)
    return KVStore.empty(
        1, batch, capacity, g, d, int4=int4, window=window, symmetric=symmetric, order=order, factor=factor,
        dtype=dtype, device=DEVICE,
    )  # fmt: skip


def products(options, batch, tokens, seed=0, dtype=torch.bfloat16, size=1.0):
    width = (options.heads + 2 * options.kv_heads) * options.dim
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed)) * size
    return x.to(DEVICE, dtype)


# ---- the specification


def test_preparation_turns_pairs_by_their_position_and_cancels_in_scores():
    options = heads_of(2, 1, 64, rotate=False, fp8=False, center=False, dtype=torch.float32)
    cos, sin = (x.float() for x in angles(64, dtype=torch.float32))
    qkv = products(options, 2, 5, dtype=torch.float32)
    start = torch.tensor([0, 2], device=DEVICE)
    q, unit, k, v = reference.prepare(qkv, cos, sin, options, torch.tensor([3], device=DEVICE), start)
    raw = qkv[1, 4, 2 * 64 : 3 * 64].double()  # the fifth token's key, at place 7, of a row that starts at 2
    turned = torch.complex(raw[:32], raw[32:]) * torch.polar(
        torch.ones(32, dtype=torch.float64), 5.0 * 1e4 ** (-torch.arange(32, dtype=torch.float64) / 32)
    ).to(DEVICE)
    torch.testing.assert_close(k[1, 0, 4].double(), torch.cat([turned.real, turned.imag]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v[:, 0], qkv[..., 3 * 64 :])
    whole = heads_of(2, 1, 64, fp8=False, center=False, scale=True, dtype=torch.float32)
    q2, unit2, k2, _ = reference.prepare(qkv, cos, sin, whole, torch.tensor([3], device=DEVICE), start)
    scores = [
        torch.einsum("bthd,bsd->bths", a.float() * b[..., None], c[:, 0]) for a, b, c in ((q, unit, k), (q2, unit2, k2))
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=2e-2, rtol=2e-3)  # fp16 numbers of queries


def test_codes_are_those_of_the_checkpoint_and_come_back():
    x = torch.randn(2, 3, 7, 64, device=DEVICE)
    x[0, 0, 0] = 0
    for symmetric in (True, False):
        codes, meta = reference.encode(x, symmetric)
        want = dequantize_kv(quantize_kv(x, symmetric), symmetric, torch.float32)
        assert torch.equal(reference.decode_kv(codes, meta), want)
        assert codes.shape == (2, 3, 7, 32)
        assert meta.shape == (2, 3, 7)


def test_a_query_reads_its_window_as_it_is_and_the_rest_from_codes():
    """One query and keys that are either of two values: the weights show which of them were read."""
    dim, tokens, window = 64, 12, 5
    q = torch.zeros(1, 1, 1, dim, device=DEVICE)  # all scores are 0
    ones = torch.ones(1, 1, tokens, dim, device=DEVICE)
    places = torch.arange(tokens, device=DEVICE)
    unit, start = torch.ones(1, 1, 1, device=DEVICE), torch.tensor([2], device=DEVICE)
    out = reference.attend(q, unit, (ones, ones), (ones, 3 * ones), places, start, window, 1.0)
    assert float(out[0, 0, 0, 0]) == pytest.approx((5 * 3 + 5 * 1) / 10)  # places 2 ... 6 coded, 7 ... 11 not
    out = reference.attend(q, unit, (ones, ones), (ones, 3 * ones), places, start, window, 1.0, sliding=7)
    assert float(out[0, 0, 0, 0]) == pytest.approx((5 * 3 + 2 * 1) / 7)
    out = reference.attend(q, unit, None, (ones, 3 * ones), places, torch.tensor([12], device=DEVICE), tokens, 1.0)
    assert float(out.abs().max()) == 0


@pytest.mark.parametrize("int4", [True, False])
def test_chunks_and_steps_give_what_one_prompt_gives(int4):
    options = heads_of(dtype=torch.float32)
    cos, sin = angles(64, dtype=torch.float32)
    qkv = products(options, 2, 30, dtype=torch.float32)
    outs = []
    for chunks in ((30,), (11, 19), (20, *[1] * 10)):
        store = store_of(options, 2, window=8, int4=int4, dtype=torch.float32)
        store.start[1] = 4
        parts = []
        for part in qkv.split(chunks, dim=1):
            parts.append(attention.attend_more(part, cos, sin, options, store, 0, scale=0.125))
            store.length += part.shape[1]
        outs.append(torch.cat(parts, 1))
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], atol=1e-5, rtol=1e-5)


# ---- the kernels


CASES = {
    "plain": {},
    "shaped, left padding": {"shape": True, "batch": 2, "left": 5, "tokens": 19, "heads": 2, "kv_heads": 1, "steps": 1},
    "128 dims, no window, symmetric": {"dim": 128, "heads": 3, "kv_heads": 1, "window": 0, "symmetric": True},
    "norm, scale, no rotation": {
        "norm": True,
        "scale": True,
        "rotate": False,
        "fp8": False,
        "window": 24,
        "sliding": 20,
    },
    "prompt within the window": {"tokens": 13, "steps": 5, "heads": 2, "kv_heads": 1},
    "16 bits": {"int4": False},
    "fewer tokens than a window slides past": {"tokens": 33, "window": 1, "sliding": 7},
}


def run_case(
    heads=4, kv_heads=2, dim=64, batch=1, tokens=37, window=16, capacity=128, steps=2, left=0, sliding=None,
    symmetric=False, shape=False, int4=True, size=1.0, **options,
):  # fmt: skip
    """Prompt and steps on the kernels against the specification in float64, from the kernels' own codes."""
    o = heads_of(heads, kv_heads, dim, **options)
    cos, sin = angles(dim, capacity + 128)
    ours, theirs = (
        store_of(o, batch, capacity, window=window, symmetric=symmetric, shape=shape, int4=int4) for _ in range(2)
    )
    ours.recent.fill_(torch.nan)
    ours.start[0] = theirs.start[0] = left
    scale, errors, differ = dim**-0.5, [], 0.0
    ks, vs = [], []
    for number in range(steps + 1):
        new = tokens if number == 0 else 1
        qkv = products(o, batch, new, seed=number, size=size)
        past = int(ours.length)
        if number == 0:
            got = attention.attend_prompt(qkv, cos, sin, o, ours, 0, scale=scale, sliding=sliding)
        else:
            got = attention.attend_step(qkv, cos, sin, o, ours, 0, scale=scale, sliding=sliding)
            again = attention.attend_step(qkv, cos, sin, o, ours, 0, scale=scale, sliding=sliding)
            assert torch.equal(got, again)
            assert not ours.arrivals.any()
        q, unit, k, v = reference.prepare(qkv, cos, sin, o, ours.length, ours.start)
        ks.append(k)
        vs.append(v)
        if number == 0:
            ours.length += new
        else:
            attention.finish_step(ours)
        attention.attend_more(qkv, cos, sin, o, theirs, 0, scale=scale, sliding=sliding)
        theirs.length += new
        end, coded = past + new, None
        assert int(ours.length) == int(theirs.length) == end
        if int4:
            coded = tuple(
                reference.decode_kv(ours.codes[0, n, :, :, :end], ours.meta[0, n, :, :, :end]) for n in (0, 1)
            )
            differ = max(differ, float((ours.codes != theirs.codes).float().mean()))
        want = reference.attend(
            q, unit, coded, (torch.cat(ks, 2), torch.cat(vs, 2)), torch.arange(end, device=DEVICE), ours.start,
            window if int4 else end, scale, sliding, torch.float64,
        )  # fmt: skip
        rows = slice(max(left - past, 0), None)  # what padding attends to is nobody's business, but that it is finite
        assert got.isfinite().all()
        errors.append(relative(got.unflatten(-1, (heads, dim))[:, rows], want[:, rows]))
    assert not ours.recent.isnan().any() or end < ours.recent.shape[4]
    return max(errors), differ


@needs_kernels
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_steps_codes_are_shaped_as_those_of_the_checkpoint(dim, symmetric):
    """One token of every ring, as layers, rows and heads have their own order and factors."""
    layers, batch, groups, ring, length = 2, 3, 2, 5, 13
    g = torch.Generator().manual_seed(5)
    m = torch.randn(layers * 2 * groups, dim, dim, generator=g)
    order, factor = shaping_factor(m @ m.transpose(1, 2))
    shape = layers, 2, groups
    store = KVStore.empty(
        layers, batch, 128, groups, dim, int4=True, window=ring, symmetric=symmetric,
        order=order.view(*shape, dim).to(DEVICE), factor=factor.view(*shape, dim, dim).to(DEVICE), device=DEVICE,
    )  # fmt: skip
    store.recent.copy_(torch.randn(store.recent.shape, generator=g))
    store.recent[0, 0, 1, 0, length % ring] = 0
    store.codes.fill_(0xAA)
    store.length += length
    attention.finish_step(store)
    assert int(store.length) == length + 1
    others = [place for place in range(128) if place != length]
    assert bool((store.codes[..., others, :] == 0xAA).all())
    rows = wrong = 0
    for layer in range(layers):
        for n in (0, 1):
            x = store.recent[layer, n, :, :, length % ring, :][:, :, None]
            codes, meta = reference.encode(x, symmetric, store.order[layer, n], store.factor[layer, n])
            assert torch.equal(store.meta[layer, n, :, :, length : length + 1], meta)
            wrong += int((store.codes[layer, n, :, :, length : length + 1] != codes).any(-1).sum())
            rows += batch * groups
    assert wrong <= (rows // 8 if GPU else 0)  # a GPU rounds once where this adds a product: ties fall to either side


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_prompts_and_steps_are_within_the_rounding_of_outputs(case):
    """bf16 rounds an output by 1.7e-3 (root mean square), weights of a prompt as much; queries and codes are exact."""
    error, differ = run_case(**CASES[case])
    assert error < 3.5e-3
    assert differ < 1e-3  # ties of noise shaping may fall to either side


@needs_kernels
@pytest.mark.parametrize("size", [1e-4, 1e4, 0.0])
def test_extreme_scales(size):
    error, _ = run_case(tokens=20, steps=1, size=size, center=False)
    assert error < 3.5e-3


@needs_kernels
def test_a_zero_value_row_counts_in_the_denominator():
    """Its scale is the smallest number there is, which must not make the key vanish."""
    o = heads_of(1, 1, 64, rotate=False, center=False)
    store, (cos, sin) = store_of(o, 1, window=1), angles(64)
    qkv = torch.zeros(1, 20, 3 * 64, device=DEVICE, dtype=torch.bfloat16)
    qkv[:, 10:, 128:] = 1.0  # all scores are 0; half of the values are 0, half 1
    attention.attend_prompt(qkv[:, :19], cos, sin, o, store, 0, scale=0.125)
    store.length += 19
    out = attention.attend_step(qkv[:, 19:], cos, sin, o, store, 0, scale=0.125)
    assert float(out[0, 0, 0]) == pytest.approx(0.5, abs=4e-3)


@needs_kernels
def test_a_nan_is_seen():
    o = heads_of(2, 1, 64)
    store, (cos, sin) = store_of(o, 1, window=4), angles(64)
    qkv = products(o, 1, 20)
    qkv[0, 3, 2 * 64] = torch.nan  # in a key that is only read from codes
    attention.attend_prompt(qkv, cos, sin, o, store, 0, scale=0.125)
    store.length += 20
    out = attention.attend_step(products(o, 1, 1, seed=1), cos, sin, o, store, 0, scale=0.125)
    assert out.isnan().all()


@needs_kernels
def test_operations_know_the_shapes_of_their_results():
    ops = attention.kernels()
    o = heads_of()
    store, (cos, sin) = store_of(o, 2), angles(64)
    store.length += 3
    qkv = products(o, 2, 1)
    q, unit, _ = ops.prepare(qkv, cos, sin, o, store.identity(), store.length, store.start, store.recent[0], False)
    arguments = (q, unit, store.codes[0], store.meta[0], store.recent[0], store.length, store.start, store.arrivals, 16)
    torch.library.opcheck(
        ops.decode.registered, (*arguments, 0.125, None), test_utils=("test_schema", "test_faketensor")
    )
    kv = torch.randn(1, 2, 2, 2, 5, 64, device=DEVICE).bfloat16()
    encoded = (kv, store.length, None, None, store.codes, store.meta, 5, False, False, True, False)
    torch.library.opcheck(ops.encode.registered, encoded, test_utils=("test_schema", "test_faketensor"))


def test_heads_that_no_kernel_takes_have_a_reason():
    if attention.kernels() is None:
        pytest.skip("no Triton")
    reasons = [
        attention.kernels().unsupported(heads_of(4, 2, 48), torch.bfloat16),
        attention.kernels().unsupported(heads_of(), torch.float32),
        attention.kernels().unsupported(heads_of(34, 2), torch.bfloat16),
    ]
    assert all(reasons)
    assert len(set(reasons)) == 3
    assert attention.kernels().unsupported(heads_of(), torch.bfloat16) is None
    assert math.isclose(attention.kernels().LOG2E, math.log2(math.e))


def test_cuts_leave_no_token_out_and_no_more_programs_than_run_at_a_time():
    if attention.kernels() is None:
        pytest.skip("no Triton")
    for pairs in (1, 3, 8, 128, 1000):
        for capacity in (0, 128, 1024, 131072):
            block, coded, near = attention.kernels().cut(pairs, capacity, 128, 128)
            assert near >= 1
            assert coded >= (capacity > 128)
            assert pairs * coded <= max(attention.kernels().PROGRAMS, pairs)
            assert block == 64 or coded * 64 < capacity


LARGE = {
    "8B": {"heads": 32, "kv_heads": 8, "dim": 128, "window": 128, "tokens": 3001, "capacity": 3200, "shape": True},
    "SmolLM2": {"heads": 9, "kv_heads": 3, "window": 128, "tokens": 777, "capacity": 900, "batch": 3, "left": 300},
    "16 queries a key": {"heads": 16, "kv_heads": 1, "dim": 128, "tokens": 500, "capacity": 600},
}


@needs_gpu
@pytest.mark.parametrize("case", LARGE)
def test_full_sizes(case):
    error, differ = run_case(**LARGE[case])
    assert error < 3.5e-3
    assert differ < 1e-3


@needs_gpu
def test_layers_and_rows_beyond_an_axis_of_a_grid():
    layers, batch, groups, dim = 32, 130, 8, 64  # 66,560 rings of keys or values
    store = KVStore.empty(layers, batch, 1, groups, dim, int4=True, window=16, device=DEVICE)
    store.recent.copy_(torch.randn(store.recent.shape, generator=torch.Generator().manual_seed(0)))
    store.length += 3
    attention.finish_step(store)
    for layer in (0, layers - 1):
        latest = store.recent[layer, :, :, :, 3:4]
        for part, codes, meta in zip(latest, store.codes[layer], store.meta[layer], strict=True):
            want = reference.encode(part, False)
            assert torch.equal(codes[:, :, 3:4], want[0])
            assert torch.equal(meta[:, :, 3:4], want[1])


@needs_gpu
def test_a_captured_step_is_replayed_at_growing_lengths():
    o = heads_of(8, 2, 128)
    stores, (cos, sin) = [store_of(o, 1, 256, window=32) for _ in range(2)], angles(128)
    prompt, steps = products(o, 1, 100), products(o, 1, 20, seed=1)
    for store in stores:
        attention.attend_prompt(prompt, cos, sin, o, store, 0, scale=0.1)
        store.length += 100
    fixed = steps[:, :1].clone()

    def step():
        out = attention.attend_step(fixed, cos, sin, o, stores[0], 0, scale=0.1)
        attention.finish_step(stores[0])
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    attention.attend_step(steps[:, :1], cos, sin, o, stores[1], 0, scale=0.1)
    attention.finish_step(stores[1])
    for i in range(1, 20):
        fixed.copy_(steps[:, i : i + 1])
        graph.replay()
        want = attention.attend_step(steps[:, i : i + 1], cos, sin, o, stores[1], 0, scale=0.1)
        attention.finish_step(stores[1])
        assert torch.equal(out, want)
