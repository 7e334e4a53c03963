"""The chunked reference against a quadratic float64 implementation written from the paper's equation."""

import pytest
import torch

from kit.kernels.linear_attention import hedgehog_feature_map, hybrid_attention, linear_state

B, D, HALF, W = 2, 16, 12, 8


def make(heads=3, kv_heads=1, map_heads=None, length=40, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    map_heads = map_heads or kv_heads
    return {
        "q": r(B, heads, length, D) * spread,
        "k": r(B, kv_heads, length, D) * spread,
        "v": r(B, kv_heads, length, D),
        "feature_map_q": r(heads, D, HALF),
        "feature_map_k": r(map_heads, D, HALF),
        "window_factor": torch.rand(heads, generator=g) + 0.05,
    }


def quadratic(
    x, window=W, scale=D**-0.5, linear=1.0, window_weight=1.0, key_mask=None, segments=None, terrace=False, sinks=0
):
    """Equation 7, one query and one head at a time, float64; the weights are kept as logarithms."""
    x = {name: t.double() for name, t in x.items()}
    meta = x.get("meta_logit")
    batch, heads, length, dim = x["q"].shape
    rep, rep_map = heads // x["k"].shape[1], heads // x["feature_map_k"].shape[0]
    out = torch.zeros(batch, heads, length, dim, dtype=torch.float64)

    def phi(vector, weight):
        z = weight.T @ vector
        return torch.cat([torch.softmax(z, 0), torch.softmax(-z, 0)])

    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                if key_mask is not None and not key_mask[b, i]:
                    continue
                log_weights, values = [], []
                seen = [j for j in range(i + 1) if key_mask is None or key_mask[b, j]]
                seen = [j for j in seen if segments is None or segments[b, i] == segments[b, j]]
                first = seen[0]
                if meta is not None:
                    log_weights.append((window_weight * x["window_factor"][h]).log() + meta[h])
                    values.append(torch.zeros(dim, dtype=torch.float64))
                for j in range(i + 1):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    if segments is not None and segments[b, i] != segments[b, j]:
                        continue
                    q, k, v = x["q"][b, h, i], x["k"][b, h // rep, j], x["v"][b, h // rep, j]
                    near = i - j < window
                    if terrace:
                        near = (i - first) // window - (j - first) // window <= 1
                    if near or j - first < sinks:
                        log_weights.append((window_weight * x["window_factor"][h]).log() + scale * (q @ k))
                    else:
                        similarity = phi(q, x["feature_map_q"][h]) @ phi(k, x["feature_map_k"][h // rep_map])
                        log_weights.append((linear * similarity).log())
                    values.append(v)
                out[b, h, i] = torch.softmax(torch.stack(log_weights), 0) @ torch.stack(values)
    return out


def run(x, **options):
    return hybrid_attention(**x, window_size=W, scale=D**-0.5, **options)


@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 2 * W, 2 * W + 1, 5 * W + 3])
@pytest.mark.parametrize(("heads", "kv_heads", "map_heads"), [(2, 2, 2), (3, 1, 1), (6, 2, 2), (6, 2, 6)])
def test_equals_the_papers_equation(length, heads, kv_heads, map_heads):
    x = make(heads, kv_heads, map_heads, length)
    torch.testing.assert_close(run(x)[0].double(), quadratic(x), atol=2e-6, rtol=2e-5)


def test_padding_and_weights_equal_the_equation():
    x = make(length=37)
    mask = torch.ones(B, 37, dtype=torch.bool)
    mask[0, :11] = False
    got = run(x, key_mask=mask, linear_weight=0.3, window_weight=2.0)[0]
    torch.testing.assert_close(
        got.double(), quadratic(x, key_mask=mask, linear=0.3, window_weight=2.0), atol=2e-6, rtol=2e-5
    )
    assert torch.count_nonzero(got[0, :, :11]) == 0


@pytest.mark.parametrize("length", [7, 41])
def test_packed_sequences_do_not_see_each_other(length):
    x = make(length=length)
    segments = torch.stack(
        [torch.arange(length) // 17, (torch.arange(length) >= 3).long() + (torch.arange(length) > 4)]
    )
    got = run(x, segment_ids=segments)[0]
    torch.testing.assert_close(got.double(), quadratic(x, segments=segments), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("options", [{"num_sinks": 3}, {"terrace": True}, {"terrace": True, "num_sinks": 3}, {}])
@pytest.mark.parametrize("batch", ["whole", "padded", "packed"])
def test_sinks_terraces_and_meta_logits_equal_the_equation(options, batch):
    x = {
        **make(heads=6, kv_heads=2, length=37),
        "meta_logit": torch.randn(6, generator=torch.Generator().manual_seed(3)),
    }
    masks, truth = {}, {"terrace": options.get("terrace", False), "sinks": options.get("num_sinks", 0)}
    if batch == "padded":
        masks["key_mask"] = torch.arange(37) >= torch.tensor([[0], [11]])
        truth["key_mask"] = masks["key_mask"]
    if batch == "packed":
        truth["segments"] = masks["segment_ids"] = torch.arange(37).expand(B, -1) // torch.tensor([[17], [23]])
    got = run(x, **options, **masks)[0]
    torch.testing.assert_close(got.double(), quadratic(x, **truth), atol=2e-6, rtol=2e-5)


def test_gradcheck_of_the_specification():
    x = {**make(heads=2, length=2 * W + 3), "meta_logit": torch.zeros(2)}
    names = list(x)
    inputs = [t[:1] if name in "qkv" else t for name, t in x.items()]
    inputs = [t.double().requires_grad_() for t in inputs]
    call = lambda *values: run(dict(zip(names, values, strict=True)), num_sinks=2)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [3, 20, 1, 16], [8, 8, 8, 16], [7, 1, 9, 23]])
@pytest.mark.parametrize("padded", [False, True])
def test_any_split_into_calls_gives_the_same_outputs_and_state(cuts, padded):
    x = make(heads=6, kv_heads=2)
    mask = torch.ones(B, 40, dtype=torch.bool)
    if padded:
        mask[1, :13] = False
    whole, whole_state = run(x, key_mask=mask, return_state=True)
    state, outs, seen = None, [], 0
    for n in cuts:
        first = max(seen - (W - 1), 0)
        part = {**x, "q": x["q"][:, :, seen : seen + n]}
        part |= {name: x[name][:, :, first : seen + n] for name in "kv"}
        out, state = run(part, state=state, key_mask=mask[:, first : seen + n], return_state=True)
        outs.append(out)
        seen += n
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, whole_state, atol=1e-5, rtol=1e-4)


def test_a_window_as_long_as_the_sequence_is_softmax_attention():
    x = make(heads=6, kv_heads=2, length=33)
    got = hybrid_attention(**x, window_size=33, scale=D**-0.5)[0]
    want = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_linear_weight_zero_is_window_attention_exactly():
    x = make(length=40)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    band = (distance >= 0) & (distance < W)
    want = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], attn_mask=band, enable_gqa=True)
    torch.testing.assert_close(run(x, linear_weight=0.0)[0], want, atol=1e-5, rtol=1e-4)
    poisoned = {**x, "feature_map_q": x["feature_map_q"] * 7, "feature_map_k": -x["feature_map_k"]}
    assert torch.equal(run(x, linear_weight=0.0)[0], run(poisoned, linear_weight=0.0)[0])


def test_scores_far_below_zero_and_far_above_do_not_overflow():
    for spread in (1e-3, 30.0):
        x = make(length=40, spread=spread)
        torch.testing.assert_close(run(x)[0].double(), quadratic(x), atol=1e-4, rtol=1e-3)
    x = make(length=5)
    x["k"] = -x["q"][:, :1] * 100  # every score near -1600, and no linear past
    assert run(x)[0].isfinite().all()


def test_gradients_match_finite_differences_and_are_finite_where_nothing_is_visible():
    x = {name: t.requires_grad_() for name, t in make(heads=2, kv_heads=1, length=2 * W + 2).items()}
    mask = torch.ones(B, 2 * W + 2, dtype=torch.bool)
    mask[0, :5] = False
    weights = torch.randn(B, 2, 2 * W + 2, D, generator=torch.Generator().manual_seed(1))
    (run(x, key_mask=mask)[0] * weights).sum().backward()
    for name in ("feature_map_q", "feature_map_k", "window_factor", "q", "k", "v"):
        grad, detached = x[name].grad, {n: t.detach() for n, t in x.items()}
        assert grad.isfinite().all(), name
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(2))
        step = 1e-5
        ends = [
            (quadratic({**detached, name: detached[name].double() + s * step * direction}, key_mask=mask) * weights)
            for s in (1, -1)
        ]
        slope = (ends[0] - ends[1]).sum() / (2 * step)
        torch.testing.assert_close((grad * direction).sum().double(), slope, rtol=2e-3, atol=1e-3)


def test_bf16_inputs_keep_fp32_accuracy():
    x = {name: t.bfloat16() for name, t in make(length=40).items()}
    out = run(x)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), quadratic(x), atol=2e-2, rtol=1e-2)


def test_autocast_does_not_round():
    x = make(length=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = run(x, return_state=True)
    want = run(x, return_state=True)
    assert torch.equal(out, want[0])
    assert torch.equal(state, want[1])


def test_feature_map_is_two_softmaxes():
    x, weight = torch.randn(B, 3, 5, D), torch.randn(3, D, HALF)
    phi = hedgehog_feature_map(x, weight)
    assert phi.shape == (B, 3, 5, 2 * HALF)
    torch.testing.assert_close(phi[..., :HALF].sum(-1), torch.ones(B, 3, 5))
    torch.testing.assert_close(phi[..., HALF:].sum(-1), torch.ones(B, 3, 5))


def test_no_tensor_grows_with_the_square_of_the_length():
    """Every intermediate stays under a small multiple of T: checked on all tensors that torch allocates."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    sizes = []
    for length in (512, 1024):
        with Largest() as mode:
            run(make(length=length), return_state=True)
        sizes.append(mode.size)
    assert sizes[1] <= 2.1 * sizes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map_q": torch.zeros(2, D, HALF)}, r"shapes do not fit.*feature_map_q \(2, "),
        ({"v": torch.zeros(B, 1, 10, D)}, r"shapes do not fit.* v \(2, 1, 10, "),
        ({"window_factor": torch.ones(2)}, r"each of 3 heads is needed, got a tensor of \(2,\)"),
        ({"state": torch.zeros(B, 1, 2 * HALF, D)}, "a state of .* is needed, got"),
        ({"q": torch.zeros(B, 3, 10, D)}, "do not fit a window"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run({**make(), **change})


def test_state_of_no_keys_is_zero():
    x = make()
    state = linear_state(x["k"][:, :, :0], x["v"][:, :, :0], x["feature_map_k"])
    assert state.shape == (B, 1, 2 * HALF, D + 1)
    assert torch.count_nonzero(state) == 0
