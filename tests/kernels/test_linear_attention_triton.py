"""The Triton kernels against the float64 specification: outputs, states and every gradient.

Without a GPU they run in Triton's interpreter, in fp32 and at small sizes. With one, `pytest tests/kernels` compiles
them, and the cases at the end run in bf16 at full size.
"""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from kit.kernels.linear_attention import dispatch, gated_reference, reference, sequence_bounds
from kit.kernels.linear_attention.decode_ops import HybridState, gated_step, hybrid_step
from kit.kernels.linear_attention.gated_ops import gated_linear_attention
from kit.kernels.linear_attention.hybrid_ops import hybrid_attention
from kit.kernels.linear_attention.recurrence_ops import map_gradient

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter")
COMPILER = "inductor" if GPU else "aot_eager"  # of torch.compile; aot_eager traces all the same
needs_gpu = pytest.mark.skipif(not GPU, reason="bf16 at full size needs a GPU")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written reads as NaN."""
    empty = torch.empty

    @torch.no_grad()  # the compiler makes leaves
    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", fill)


def relative(got, want):
    got, want = got.detach().cpu().double(), want.detach().double()
    size = want.norm()
    return float((got - want).norm() / size) if size > 1e-9 else float(got.norm())


def compare(ours, theirs, inputs, options, dtype, *, grad=True, trained=None):
    """Relative errors of the output, the state and all gradients, ours in a dtype on the device, theirs in float64."""
    generator = torch.Generator().manual_seed(9)
    low = {n: t.to(dtype) if n in ("q", "k", "v") else t for n, t in inputs.items()}
    if dtype != torch.float32:
        low |= {n: t.to(dtype) for n, t in inputs.items() if n.startswith("feature_map")}
    a = {n: t.to(DEVICE).requires_grad_(grad) for n, t in low.items()}
    b = {n: t.double().requires_grad_(grad) for n, t in low.items()}
    place = lambda o, kind: {n: v.to(kind) if isinstance(v, torch.Tensor) else v for n, v in o.items()}  # noqa: E731
    out, state = ours(**a, **place(options[0], DEVICE))
    want, want_state = theirs(**b, **options[1])
    errors = {"out": relative(out, want)}
    weights = torch.randn(want.shape, generator=generator).to(dtype)
    loss, want_loss = (out.float() * weights.to(DEVICE)).sum(), (want * weights.double()).sum()
    if want_state is not None:
        errors["state"] = relative(state, want_state)
        weights = torch.randn(want_state.shape, generator=generator) * 0.1
        if state.requires_grad:
            loss, want_loss = loss + (state * weights.to(DEVICE)).sum(), want_loss + (want_state * weights).sum()
    if grad:
        grads = (torch.autograd.grad(x, list(y.values()), allow_unused=True) for x, y in ((loss, a), (want_loss, b)))
        for name, got, truth in zip(a, *grads, strict=True):
            unused = torch.zeros_like(b[name])
            errors[name] = relative(unused if got is None else got, unused if truth is None else truth)
    return errors


def gated_inputs(batch=2, heads=2, kv_heads=1, length=50, dim=32, width=32, half=None, gate=1.0, state=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x = {
        "q": r(batch, heads, length, dim),
        "k": r(batch, kv_heads, length, dim),
        "v": r(batch, kv_heads, length, width),
    }
    if half:
        x |= {"q": x["q"] * 0.7, "k": x["k"] * 0.7}
        x |= {"feature_map_q": r(heads, dim, half) * 0.3, "feature_map_k": r(kv_heads, dim, half) * 0.3}
    else:
        x |= {n: x[n].abs() * 0.3 + 0.01 for n in "qk"}
    if gate:
        x["log_gate"] = -gate * torch.rand(batch, heads, length, generator=g) ** 2
    if state:
        features = 2 * half if half else dim
        sums = r(state, heads, features, 1).abs() * features
        x["state"] = torch.cat([r(state, heads, features, width), sums], -1)
    return x


GATED = {
    "no gate, no denominator": ({"gate": 0, "length": 37}, {"normalize": False, "scale": 0.5}),
    "one token": ({"length": 1}, {}),
    "gates": ({}, {"normalize": False}),
    "denominator": ({"gate": 0}, {"return_state": True}),
    "gates, denominator and state": ({"state": 2}, {"return_state": True}),
    "strong gates": ({"gate": 20.0, "length": 70}, {}),
    "maps": ({"half": 16, "heads": 4, "kv_heads": 2, "gate": 0}, {"return_state": True}),
    "several value blocks": ({"dim": 64, "width": 64, "length": 40, "state": 2}, {"return_state": True}),
    "keys and values of different sizes": ({"dim": 64, "width": 32, "length": 33}, {}),
    "sequences": (
        {"half": 16, "heads": 4, "kv_heads": 2},
        {"bounds": torch.tensor([[0, 0, 20], [0, 20, 50], [1, 7, 50]]), "return_state": True},
    ),
    "an empty sequence": ({}, {"bounds": torch.tensor([[0, 0, 50], [1, 0, 0]])}),
    "splits": ({"batch": 1, "heads": 1, "length": 1100, "state": 1}, {"return_state": True}),
}


def test_a_map_too_large_for_a_multiprocessor():
    g = torch.Generator().manual_seed(0)
    x, maps, d_phi = (torch.randn(*shape, generator=g) for shape in ((1, 1, 5, 256), (2, 256, 128), (1, 2, 5, 256)))
    truth = [t.double().requires_grad_() for t in (x, maps)]
    phi = reference.hedgehog_feature_map(truth[0].expand(-1, 2, -1, -1) * 0.1, truth[1])
    want = torch.autograd.grad((phi * d_phi).sum(), truth)
    before = torch.randn(x.shape, generator=g)
    got = map_gradient(x.to(DEVICE) * 0.1, maps.to(DEVICE), d_phi.to(DEVICE), before.to(DEVICE, copy=True))
    assert relative(got[0], want[0] * 10 + before) < 1e-5
    assert relative(got[1], want[1]) < 1e-5


@pytest.mark.parametrize("case", GATED)
def test_gated_attention_equals_the_specification(case):
    shape, options = GATED[case]
    inputs = gated_inputs(**shape)
    errors = compare(
        gated_linear_attention, gated_reference.gated_linear_attention, inputs, (options, options), torch.float32
    )
    assert max(errors.values()) < 1e-5, errors


def hybrid_inputs(
    batch=2, heads=2, kv_heads=1, map_heads=None, length=50, past=0, dim=32, width=32, half=16, meta=False
):
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x = {
        "q": r(batch, heads, length, dim) * 0.7,
        "k": r(batch, kv_heads, past + length, dim) * 0.7,
        "v": r(batch, kv_heads, past + length, width),
        "feature_map_q": r(heads, dim, half) * 0.3,
        "feature_map_k": r(map_heads or kv_heads, dim, half) * 0.3,
        "window_factor": torch.rand(heads, generator=g) * 0.8 + 0.1,
    }
    return x | ({"meta_logit": r(heads)} if meta else {})


def segments(*cuts, length=50):
    out = torch.zeros(len(cuts), length, dtype=torch.long)
    for row, places in enumerate(cuts):
        for place in places:
            out[row, place:] += 1
    return out


def padding(*ranges, length=50):
    return torch.stack([(torch.arange(length) >= a) & (torch.arange(length) < b) for a, b in ranges])


HYBRID = {
    "window 20": ({}, {"window_size": 20}, {}),
    "window 16, a map a query head": ({"heads": 4, "kv_heads": 2, "map_heads": 4}, {"window_size": 16}, {}),
    "window 32, past of one key": ({"length": 33}, {"window_size": 32}, {}),
    "window 48, sinks and a meta logit": (
        {"length": 140, "batch": 1, "meta": True},
        {"window_size": 48, "num_sinks": 5, "window_weight": 0.7, "linear_weight": 0.3},
        {},
    ),
    "window 16, padding": (
        {"length": 110, "batch": 3},
        {"window_size": 16, "return_state": True},
        {"key_mask": padding((0, 110), (13, 96), (0, 0), length=110)},
    ),
    "window 16, packed": (
        {"length": 150},
        {"window_size": 16, "num_sinks": 3},
        {"segment_ids": segments([17, 18, 110], [40], length=150)},
    ),
    "window 16, splits": (
        {"batch": 1, "heads": 1, "length": 1100},
        {"window_size": 16, "num_sinks": 4},
        {},
    ),
    "window 1": ({"length": 20}, {"window_size": 1}, {}),
    "window 37": ({"length": 70}, {"window_size": 37}, {}),
    "one token": ({"length": 1}, {"window_size": 20}, {}),
    "terrace": ({"length": 110}, {"window_size": 32, "terrace": True}, {}),
    "sinks": ({"heads": 4, "kv_heads": 2}, {"window_size": 20, "num_sinks": 4}, {}),
    "fewer tokens than sinks": ({"length": 3}, {"window_size": 2, "num_sinks": 5}, {}),
    "sinks in a terrace": ({"length": 70}, {"window_size": 16, "terrace": True, "num_sinks": 4}, {}),
    "meta logit": ({"meta": True}, {"window_size": 20}, {}),
    "window alone": ({"meta": True}, {"window_size": 20, "num_sinks": 4, "linear_weight": 0.0}, {}),
    "past alone": ({}, {"window_size": 20, "window_weight": 0.0}, {}),
    "weights": ({}, {"window_size": 20, "window_weight": 0.7, "linear_weight": 0.3}, {}),
    "padding": ({}, {"window_size": 20, "return_state": True}, {"key_mask": padding((0, 50), (13, 50))}),
    "an empty row": ({}, {"window_size": 20, "num_sinks": 2}, {"key_mask": padding((0, 31), (0, 0))}),
    "packed": ({}, {"window_size": 20, "num_sinks": 3}, {"segment_ids": segments([17, 18], [40])}),
    "splits": ({"batch": 1, "heads": 1, "length": 1100}, {"window_size": 20, "return_state": True, "num_sinks": 4}, {}),
    "several value blocks": ({"dim": 64, "width": 64, "half": 32, "length": 40, "meta": True}, {"window_size": 20}, {}),
}


@pytest.mark.parametrize("case", HYBRID)
def test_hybrid_attention_equals_the_specification(case):
    shape, options, masks = HYBRID[case]
    inputs = hybrid_inputs(**shape)
    options = options | {"scale": inputs["q"].shape[-1] ** -0.5}
    ours = options | ({"bounds": sequence_bounds(**masks)} if masks else {})
    errors = compare(hybrid_attention, reference.hybrid_attention, inputs, (ours, options | masks), torch.float32)
    if case == "window alone":  # g then cancels, and so does its gradient
        assert abs(errors.pop("window_factor")) < 1e-4
    errors["window_factor"] = errors.get("window_factor", 0) / 10  # a sum over the whole batch in which much cancels
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("past", "length"), [(15, 40), (19, 1), (19, 21)])
def test_hybrid_attention_carries_on_from_a_state(past, length):
    inputs = hybrid_inputs(heads=4, kv_heads=2, past=past, length=length)
    g = torch.Generator().manual_seed(1)
    state = torch.cat([torch.randn(2, 2, 32, 32, generator=g), torch.rand(2, 2, 32, 1, generator=g) * 10], -1)
    options = {"window_size": 20, "scale": 32**-0.5, "return_state": True}
    ours, theirs = options | {"state": state}, options | {"state": state.double()}
    errors = compare(hybrid_attention, reference.hybrid_attention, inputs, (ours, theirs), torch.float32, grad=False)
    assert max(errors.values()) < 1e-5, errors
    inputs["q"].requires_grad_()
    with pytest.raises(ValueError, match="cannot be trained from a state"):
        hybrid_attention(**{n: t.to(DEVICE) for n, t in inputs.items()}, **options)


@pytest.mark.parametrize(
    ("map_heads", "options"),
    [
        (2, {}),
        (4, {}),
        (2, {"num_sinks": 3, "meta": True}),
        (4, {"window_weight": 0.0}),
        (2, {"linear_weight": 0.0, "num_sinks": 2}),
    ],
)
def test_decoding_step_by_step_equals_the_whole(map_heads, options):
    length, window = 30, 7
    inputs = hybrid_inputs(heads=4, kv_heads=2, map_heads=map_heads, length=length, meta=options.pop("meta", False))
    weights = {n: options[n] for n in options if n != "num_sinks"}
    want, _ = reference.hybrid_attention(
        **{n: t.double() for n, t in inputs.items()}, window_size=window, scale=0.2, **options
    )
    q, k, v, map_q, map_k, factor, *meta = (t.to(DEVICE) for t in inputs.values())
    state = HybridState.empty(
        k, v, map_heads=map_heads, features=32, window_size=window, num_sinks=options.get("num_sinks", 0)
    )
    position, out = torch.zeros(2, dtype=torch.int32, device=DEVICE), []
    for t in range(length):
        args = (q[:, :, t], k[:, :, t], v[:, :, t], map_q, map_k, factor.log(), state, position)
        out.append(hybrid_step(*args, scale=0.2, meta_logit=meta[0] if meta else None, **weights))
        position += 1
    assert relative(torch.stack(out, 2), want) < 1e-5
    assert not state.arrivals.any()


@pytest.mark.parametrize(("half", "normalize"), [(16, True), (None, False)])
def test_gated_decoding_equals_the_whole(half, normalize):
    x = gated_inputs(heads=4, kv_heads=2, length=20, half=half)
    options = {"normalize": normalize, "scale": 1.0 if normalize else 0.3}
    want, _ = gated_reference.gated_linear_attention(**{n: t.double() for n, t in x.items()}, **options)
    x = {n: t.to(DEVICE) for n, t in x.items()}
    states, sums = torch.zeros(2, 4, 32, 32, device=DEVICE), torch.zeros(2, 2, 4, 32, device=DEVICE)
    position, out = torch.zeros(2, dtype=torch.int32, device=DEVICE), []
    maps = (x.get("feature_map_q"), x.get("feature_map_k"))
    for t in range(20):
        rows = (x[n][:, :, t] for n in ("q", "k", "v", "log_gate"))
        out.append(gated_step(*rows, states, sums, position, *maps, **options))
        position += 1
    assert relative(torch.stack(out, 2), want) < 1e-5


def test_gated_decoding_of_heads_that_share_a_state():
    """States, denominators and gates a map of keys, in parts of larger tensors."""
    x = gated_inputs(heads=6, kv_heads=2, length=12, half=16)
    x["log_gate"] = x["log_gate"][:, ::3].repeat_interleave(3, 1)
    want, _ = gated_reference.gated_linear_attention(**{n: t.double() for n, t in x.items()})
    x = {n: t.to(DEVICE) for n, t in x.items()}
    kept = torch.zeros(2, 2 * 32 * 34 + 16, device=DEVICE)
    states = kept[:, : 2 * 32 * 32].unflatten(1, (2, 32, 32))
    sums = kept[:, 2 * 32 * 32 : -16].unflatten(1, (2, 2, 32)).transpose(0, 1)
    position, out = torch.zeros(2, dtype=torch.int32, device=DEVICE), []
    for t in range(12):
        rows = (x[n][:, :, t] for n in ("q", "k", "v"))
        gate = x["log_gate"][:, ::3, t]
        out.append(gated_step(*rows, gate, states, sums, position, x["feature_map_q"], x["feature_map_k"]))
        position += 1
    assert relative(torch.stack(out, 2), want) < 1e-5
    assert not kept[:, -16:].any()


def on_device(inputs):
    return {n: t.to(DEVICE) for n, t in inputs.items()}


def backends(inputs, **options):
    """What the reference and the kernels give through the dispatch."""
    return [dispatch.hybrid_attention(**inputs, scale=0.2, backend=name, **options) for name in ("reference", "triton")]


def test_the_dispatch_turns_masks_into_bounds():
    x, mask = on_device(hybrid_inputs()), padding((0, 50), (13, 50)).to(DEVICE)
    with torch.inference_mode():
        (want, _), (got, _) = backends(x, window_size=20, key_mask=mask)
    assert relative(got, want.cpu()) < 1e-5
    mask[0, :3] = False  # the same tensor holds another mask now
    (want, _), (got, _) = backends(x, window_size=20, key_mask=mask)
    assert relative(got, want.cpu()) < 1e-5


def test_tokens_padded_on_the_right_leave_the_same_state():
    (want, state), (got, ours) = backends(
        on_device(hybrid_inputs()), window_size=20, key_mask=padding((0, 31), (5, 44)).to(DEVICE), return_state=True
    )
    assert relative(got, want.cpu()) < 1e-5
    assert relative(ours, state.cpu()) < 1e-5


def test_a_meta_logit_goes_with_the_window():
    (want, _), (got, _) = backends(on_device(hybrid_inputs(meta=True)), window_size=20, window_weight=0.0)
    assert relative(got, want.cpu()) < 1e-5


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"key_mask": torch.arange(50).expand(2, -1) % 3 > 0}, "in one piece"),
        ({}, {"key_mask": padding((0, 50), (3, 50)), "segment_ids": segments([17], [40])}, "not both"),
        ({}, {"segment_ids": segments([17], [40]), "return_state": True}, "no state of packed"),
        ({"past": 9}, {"key_mask": torch.ones(2, 59, dtype=torch.bool)}, "no key mask with past keys"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_the_reference_unless_they_are_asked_for(
    change, options, message, monkeypatch
):
    x = on_device(hybrid_inputs(**change))
    options = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    options |= {"window_size": 20, "scale": 0.2}
    with pytest.raises(ValueError, match=message):
        dispatch.hybrid_attention(**x, **options, backend="triton")
    want, _ = dispatch.hybrid_attention(**x, **options, backend="reference")
    monkeypatch.setattr(dispatch, "_chosen", lambda backend, v: dispatch._triton())  # as for bf16 on CUDA
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=message):
        got, _ = dispatch.hybrid_attention(**x, **options)
    assert torch.equal(got, want)


def test_what_is_learned_cannot_be_learned_from_a_state_on():
    x = on_device(hybrid_inputs(past=9))
    x["window_factor"].requires_grad_()
    with pytest.raises(ValueError, match="cannot be trained from a state"):
        dispatch.hybrid_attention(**x, window_size=20, scale=0.2, backend="triton")


def test_wrong_shapes_are_named_before_the_kernels_run():
    x = on_device(hybrid_inputs(heads=3, kv_heads=2, map_heads=3))
    with pytest.raises(ValueError, match="shapes do not fit"):
        dispatch.hybrid_attention(**x, window_size=20, scale=0.2, backend="triton")
    x = on_device(hybrid_inputs(past=9))
    with pytest.raises(ValueError, match="whole sequences"):
        dispatch.hybrid_attention(**x, window_size=16, scale=0.2, terrace=True, backend="triton")
    q, k, v = (torch.zeros(1, heads, 32, device=DEVICE) for heads in (32, 1, 1))
    maps = torch.zeros(32, 32, 16, device=DEVICE), torch.zeros(1, 32, 16, device=DEVICE)
    state = HybridState.empty(k, v, map_heads=1, features=32, window_size=8)
    with pytest.raises(ValueError, match="at most 16 query heads a state"):
        hybrid_step(q, k, v, *maps, torch.zeros(32), state, torch.zeros(1, dtype=torch.int32), scale=1.0)
    state.ring_v = v.new_zeros(1, 1, 8, 32)
    with pytest.raises(ValueError, match=r"ring_v of \(1, 1, 9, 32\) is needed, got \(1, 1, 8, 32\)"):
        hybrid_step(q, k, v, *maps, torch.zeros(32), state, torch.zeros(1, dtype=torch.int32), scale=1.0)
    for change, message in (
        ({"k": torch.zeros(2, 1, 49, 32)}, r"shapes do not fit.* k \(2, 1, 49, 32\)"),
        ({"log_gate": torch.zeros(2, 3, 50)}, r"log_gate \(2, 3, 50\)"),
        ({"state": torch.zeros(2, 2, 32, 32)}, r"state of \(2, 2, 32, 33\) is needed, got \(2, 2, 32, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch.gated_linear_attention(**on_device(gated_inputs() | change), backend="triton")


def test_shapes_without_tiles_are_named():
    x = {n: t.to(DEVICE) for n, t in hybrid_inputs(dim=24, width=24).items()}
    with pytest.raises(ValueError, match="head dim of 32, 64, 128 or 256, got 24"):
        dispatch.hybrid_attention(**x, window_size=8, scale=0.2, backend="triton")
    x = {n: t.to(DEVICE) for n, t in hybrid_inputs().items()}
    for options, message in (
        ({"window_size": 2048}, "windows from 1 to 1024, got 2048"),
        ({"window_size": 24, "terrace": True}, "terraces of .* got 24"),
        ({"window_size": 20, "num_sinks": 17}, "at most 16 sinks, got 17"),
    ):
        with pytest.raises(ValueError, match=message):
            hybrid_attention(**x, scale=0.2, **options)
    with pytest.raises(ValueError, match="backend is None"):
        dispatch.hybrid_attention(**x, window_size=8, scale=0.2, backend="cuda")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("case", ["hybrid", "past alone", "gated", "raw features"])
def test_operations_know_their_shapes_without_running(case, kv_heads):
    """torch.compile traces with fake tensors: shapes, dtypes and layouts must be those of real calls and gradients."""
    from torch._subclasses import FakeTensorMode

    call, inputs, options = {
        "hybrid": (hybrid_attention, hybrid_inputs, {"window_size": 20, "scale": 0.2, "return_state": True}),
        "past alone": (hybrid_attention, hybrid_inputs, {"window_size": 20, "scale": 0.2, "window_weight": 0.0}),
        "gated": (gated_linear_attention, gated_inputs, {"return_state": True}),
        "raw features": (gated_linear_attention, gated_inputs, {"normalize": False}),
    }[case]
    inputs = inputs(kv_heads=kv_heads, **({"half": 16} if case == "gated" else {}))
    for name in "qkv":  # laid out as projections leave them
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs = {n: t.to(DEVICE).requires_grad_() for n, t in inputs.items()}

    def layouts(values):
        out, state = call(**values, **options)
        grads = torch.autograd.grad(out, list(values.values()), torch.ones_like(out), allow_unused=True)
        return [(t.shape, t.dtype, t.stride()) for t in (out, state, *grads) if t is not None]

    with FakeTensorMode() as mode:
        fake = layouts({n: mode.from_tensor(t) for n, t in inputs.items()})
    real = layouts(inputs)
    assert fake == real
    assert [t.stride() for t in list(inputs.values())[:3]] == [stride for *_, stride in real[-len(inputs) :]][:3]


@needs_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("gate", [0.0, 0.05, 5.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_gated_attention_in_bf16(dim, gate, normalize):
    x = gated_inputs(heads=4, kv_heads=2, length=1000, dim=dim, width=dim, gate=gate)
    options = {"normalize": normalize, "scale": 1.0 if normalize else 0.1}
    errors = compare(
        gated_linear_attention, gated_reference.gated_linear_attention, x, (options, options), torch.bfloat16
    )
    assert errors["out"] < 3e-3, errors
    assert max(errors.values()) < 1.2e-2, errors  # Σ do·y is of rounded outputs, as elsewhere; see docs/kernels.md


@needs_gpu
@pytest.mark.parametrize(
    ("dim", "options"),
    [
        *itertools.product(
            [64, 128], [{}, {"num_sinks": 4}, {"terrace": True}, {"window_size": 128}, {"window_size": 50}]
        ),
        (256, {}),
    ],
)
def test_hybrid_attention_in_bf16(dim, options):
    x = hybrid_inputs(heads=4, kv_heads=2, length=1200, dim=dim, width=dim, half=dim // 2, meta="num_sinks" in options)
    options = {"window_size": 64, "scale": dim**-0.5} | options
    errors = compare(hybrid_attention, reference.hybrid_attention, x, (options, options), torch.bfloat16)
    assert errors["out"] < 3e-3, errors
    errors.pop("window_factor")  # a sum in which nearly all cancels
    assert max(errors.values()) < 6e-3, errors


@needs_gpu
@pytest.mark.parametrize(("dim", "num_sinks"), [(64, 2), (128, 0)])
@pytest.mark.parametrize("mask", ["packed", "padding"])
def test_sequences_in_bf16(mask, dim, num_sinks):
    x = hybrid_inputs(heads=4, kv_heads=2, length=1200, dim=dim, width=dim, half=dim // 2)
    masks = {
        "packed": {"segment_ids": segments([70, 71, 900], [513], length=1200)},
        "padding": {"key_mask": padding((0, 1200), (101, 1077), length=1200)},
    }[mask]
    options = {"window_size": 64, "scale": dim**-0.5, "num_sinks": num_sinks}
    ours = options | {"bounds": sequence_bounds(**masks)}
    errors = compare(hybrid_attention, reference.hybrid_attention, x, (ours, options | masks), torch.bfloat16)
    errors.pop("window_factor")
    assert max(errors.values()) < 6e-3, errors


SIZES = [
    (64, 128, 256),
    (64, 64, 64),
    (64, 128, 128),
    (128, 64, 128),
    (128, 64, 64),
    (128, 256, 128),
    (256, 64, 64),
    (256, 128, 256),
    (256, 256, 256),
]


@needs_gpu
@pytest.mark.parametrize(("dim", "width", "features"), SIZES)
@pytest.mark.parametrize("case", ["hybrid", "sinks", "gated", "state"])
def test_heads_values_and_features_of_every_size_in_bf16(case, dim, width, features):
    errors = errors_of_a_size(case, dim, width, features, torch.bfloat16)
    assert errors["out"] < (3.3e-3 if case == "state" else 3e-3), errors  # a state of random signs is rounded too
    assert max(errors.values()) < 1.2e-2, errors


@needs_gpu
@pytest.mark.parametrize("case", ["sinks", "gated"])
@pytest.mark.parametrize("size", [(128, 64, 128), (256, 256, 256)])
def test_heads_values_and_features_of_large_sizes_in_fp32(case, size):
    assert max(errors_of_a_size(case, *size, torch.float32).values()) < 1e-5


def errors_of_a_size(case, dim, width, features, dtype):
    shape = {"heads": 4, "kv_heads": 2, "length": 300, "dim": dim, "width": width, "half": features // 2}
    if case in ("hybrid", "sinks"):
        x = hybrid_inputs(**shape, meta=case == "sinks")
        options = {"window_size": 64, "scale": dim**-0.5, "num_sinks": 4 if case == "sinks" else 0}
        calls = hybrid_attention, reference.hybrid_attention
    else:
        x = gated_inputs(**shape, gate=0.1, state=2 if case == "state" else None)
        options = {"return_state": case == "state"}
        calls = gated_linear_attention, gated_reference.gated_linear_attention
    errors = compare(*calls, x, (options, options), dtype)
    errors.pop("window_factor", None)  # a sum in which nearly all cancels
    return errors


@needs_gpu
@pytest.mark.parametrize("case", ["gates", "denominator", "hybrid", "hybrid, features inside"])
def test_a_million_tokens(case):
    """Outputs are right at the end as at the start, and gradients stay finite."""
    hybrid, half = case.startswith("hybrid"), 64 if case == "hybrid, features inside" else 32
    shape = {"batch": 1, "heads": 1, "length": 2**20, "dim": 64, "width": 64, "half": half}
    options: dict = {"window_size": 64, "scale": 0.125} if hybrid else {"normalize": case == "denominator"}
    x = hybrid_inputs(**shape) if hybrid else gated_inputs(**shape, gate=0.05 if case == "gates" else 0)
    x = {n: t.to(DEVICE) for n, t in x.items()}
    x = {n: t if n in ("window_factor", "log_gate") else t.bfloat16() for n, t in x.items()}
    ours, theirs = gated_linear_attention, gated_reference.gated_linear_attention
    if hybrid:
        ours, theirs = hybrid_attention, reference.hybrid_attention
    out, _ = ours(**{n: t.requires_grad_() for n, t in x.items()}, **options)
    assert all(t.isfinite().all() for t in torch.autograd.grad(out.float().sum(), list(x.values())))
    want, _ = theirs(**{n: t.detach().double() for n, t in x.items()}, **options)
    for part in (slice(0, 2**10), slice(2**20 - 2**10, None), slice(None)):
        assert relative(out[:, :, part], want[:, :, part].cpu()) < 3e-3


@needs_gpu
@pytest.mark.parametrize(("batch", "map_heads", "dim", "width"), [
    (1, 8, 128, 128), (1, 2, 128, 128), (16, 8, 64, 128), (512, 2, 128, 128), (512, 8, 128, 64), (3, 2, 256, 256),
])  # fmt: skip
def test_decoding_in_a_cuda_graph_in_bf16(batch, map_heads, dim, width):
    """One captured step, replayed: tokens, positions and state change, and lie where they were when it was captured."""
    length, window = 90, 64
    x = hybrid_inputs(batch, 8, 2, map_heads, length, dim=dim, width=width, half=64)
    x = {n: t if n == "window_factor" else t.bfloat16() for n, t in x.items()}
    rows = [0, batch - 1]
    truth = {n: t[rows].double() if n in ("q", "k", "v") else t.double() for n, t in x.items()}
    want, _ = reference.hybrid_attention(**truth, window_size=window, scale=dim**-0.5, num_sinks=4)
    q, k, v, map_q, map_k, factor = (t.to(DEVICE) for t in x.values())
    token = [t[:, :, 0].clone() for t in (q, k, v)]
    state = HybridState.empty(k, v, map_heads=map_heads, features=128, window_size=window, num_sinks=4)
    position = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    step = lambda: hybrid_step(*token, map_q, map_k, factor.log(), state, position, scale=dim**-0.5)  # noqa: E731
    step()  # compiles; it leaves what is set to zero below
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
        position += 1
    for tensor in (*vars(state).values(), position):
        tensor.zero_()
    got = []
    for t in range(length):
        for buffer, whole in zip(token, (q, k, v), strict=True):
            buffer.copy_(whole[:, :, t])
        graph.replay()
        got.append(out[rows].clone())
    assert relative(torch.stack(got, 2), want) < 3e-3


@needs_gpu
def test_channel_gates_and_the_delta_rule_on_flash_linear_attention():
    pytest.importorskip("fla")
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    q, k, v = (r(2, 2, 150, 64) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    gate, beta = -torch.rand(2, 2, 150, 64, generator=g), torch.rand(2, 2, 150, generator=g)
    state = torch.randn(2, 2, 64, 64, generator=g)
    for name, inputs in (
        ("channel_gated_linear_attention", (q, k, v, gate)),
        ("gated_delta_rule", (q, k, v, beta, gate[..., 0])),
    ):
        want = getattr(gated_reference, name)(*(t.double() for t in inputs), scale=0.1, state=state.double())
        got = getattr(dispatch, name)(*(t.to(DEVICE) for t in inputs), scale=0.1, state=state.to(DEVICE))
        assert all(relative(*pair) < 1e-2 for pair in zip(got, want, strict=True)), name


def test_torch_compile_keeps_the_operations_in_one_graph():
    x = hybrid_inputs(batch=1, length=36)
    x["log_gate"] = -0.1 * torch.rand(1, 2, 36, generator=torch.Generator().manual_seed(1))
    x = {n: t.to(DEVICE).requires_grad_() for n, t in x.items()}

    def layer(q, k, v, feature_map_q, feature_map_k, window_factor, log_gate):
        maps = {"feature_map_q": feature_map_q, "feature_map_k": feature_map_k, "backend": "triton"}
        out, _ = dispatch.hybrid_attention(
            q * 0.9, k, v, **maps, window_factor=window_factor, window_size=20, scale=0.2
        )
        return out + dispatch.gated_linear_attention(q, k, v, log_gate, **maps)[0]

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend=COMPILER)):
        out = call(**x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(x.values()))))
    for want, got in zip(*results, strict=True):
        assert relative(got, want.cpu()) < 1e-5


def test_torch_compile_keeps_decoding_in_one_graph():
    x = hybrid_inputs(batch=1, heads=2, kv_heads=2, length=6)
    q, k, v, map_q, map_k, factor = (t.to(DEVICE) for t in x.values())

    def step(q, k, v, state, position):
        return hybrid_step(q * 0.9, k, v, map_q, map_k, factor.log(), state, position, scale=0.2) * 2

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend=COMPILER)):
        state = HybridState.empty(k, v, map_heads=2, features=32, window_size=4)
        position, out = torch.zeros(1, dtype=torch.int32, device=DEVICE), []
        for t in range(6):
            out.append(call(q[:, :, t], k[:, :, t], v[:, :, t], state, position))
            position += 1
        results.append((torch.stack(out), state.states))
    for want, got in zip(*results, strict=True):
        assert relative(got, want.cpu()) < 1e-5
