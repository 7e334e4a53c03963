"""Both kernels against float64 formulas: every batch size, odd shapes, empty and full masks, NaN, and determinism.

Without a GPU the Triton code runs in Triton's interpreter (tests/conftest.py switches it on).
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.kernels.sparse_matvec import (
    HAS_TRITON,
    cpu_kernel,
    reference,
    sparse_linear,
    sparse_linear_int4,
    sparse_linears,
    sparse_swiglu,
)
from kit.modules.bundler import write_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", "cpu", "triton"]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest output
SHAPES = [(64, 256), (77, 130), (1, 1), (130, 33), (257, 300)]  # K, N


def implementation(name, dtype=torch.float32):
    """(linear, swiglu, device) of one implementation, or skip."""
    if name == "reference":
        linear = lambda x, w, t, s, low_rank, b: reference.sparse_linear(x, w, t, s, low_rank=low_rank, bias=b)  # noqa: E731
        return linear, reference.sparse_swiglu, "cpu"
    if name == "cpu":
        if cpu_kernel.library() is None or dtype not in cpu_kernel.DTYPES:
            pytest.skip("not on this CPU")
        return cpu_kernel.sparse_linear, cpu_kernel.sparse_swiglu, "cpu"
    if not HAS_TRITON:
        pytest.skip("no Triton")
    from kit.kernels.sparse_matvec import launch

    return launch.sparse_linear, launch.sparse_swiglu, DEVICE


def data(rows, inputs, outputs, dtype=torch.float32, rank=3, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    tensors = {
        "x": r(rows, inputs),
        "w": r(inputs, outputs) / inputs**0.5,
        "up_t": r(rank, outputs),
        "down": r(rank, inputs) / inputs**0.5,
        "bias": r(outputs),
    }
    tensors = {name: t.to(dtype).to(device) for name, t in tensors.items()}
    return tensors | {"scale": (torch.rand(inputs, generator=g) + 0.5).to(device)}


def formula(x, w, threshold, scale=None, low_rank=None, bias=None):
    """One row and one channel at a time, in float64."""
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            value = x[row, i].double().cpu()
            score = abs(x[row, i].float()) * (1 if scale is None else scale[i])
            if math.isnan(value) or score > threshold:
                out[row] += value * w[i].double().cpu()
            elif low_rank is not None:
                out[row] += value * (low_rank[1][:, i].double().cpu() @ low_rank[0].double().cpu())
        if bias is not None:
            out[row] += bias.double().cpu()
    return out


def close(y, expected, dtype):
    assert y.dtype == dtype
    error = (y.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= BOUNDS[dtype], f"{error:.1e}"


# ---- input-sparse linear


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_linear_is_masked_dense(name, inputs, outputs, rows):
    linear, _, device = implementation(name)
    d = data(rows, inputs, outputs, device=device)
    y = linear(d["x"], d["w"], 0.7, d["scale"], None, None)
    close(y, formula(d["x"], d["w"], 0.7, d["scale"]), torch.float32)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_linear_with_everything_in_every_dtype(name, rows, dtype):
    linear, _, device = implementation(name, dtype)
    d = data(rows, 150, 200, dtype, device=device)
    low_rank = d["up_t"], d["down"]
    y = linear(d["x"], d["w"], 0.7, d["scale"], low_rank, d["bias"])
    close(y, formula(d["x"], d["w"], 0.7, d["scale"], low_rank, d["bias"]), dtype)


@pytest.mark.parametrize(("threshold", "kept"), [(-1.0, "all"), (math.inf, "none")])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_all_and_nothing_kept(name, threshold, kept):
    linear, _, device = implementation(name)
    d = data(2, 77, 130, device=device)
    d["x"][0, :5] = 0  # kept too when all are: a threshold below zero is not a test for zero
    y = linear(d["x"], d["w"], threshold, d["scale"], None, None)
    dense = d["x"].double().cpu() @ d["w"].double().cpu()
    if kept == "all":
        close(y, dense, torch.float32)
    else:
        assert torch.equal(y.cpu(), torch.zeros(2, 130))
    y = linear(d["x"], d["w"], threshold, None, (d["up_t"], d["down"]), d["bias"])
    low = d["x"].double().cpu() @ d["down"].T.double().cpu() @ d["up_t"].double().cpu()
    close(y, (dense if kept == "all" else low) + d["bias"].double().cpu(), torch.float32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_score_at_the_threshold_is_dropped_and_one_above_is_kept(name):
    linear, _, device = implementation(name)
    x = torch.tensor([[0.5, -0.5, 0.5001, -0.5001, 0.25, -0.3]], device=device)
    scale = torch.tensor([1.0, 1, 1, 1, 2, 2], device=device)
    y = linear(x, torch.eye(6, device=device), 0.5, scale, None, None)
    assert torch.equal(y.cpu(), torch.tensor([[0, 0, 0.5001, -0.5001, 0, -0.3]]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_do_not_change_each_other(name):
    """Rows share what is read, not what is kept: a channel that only the second row keeps adds nothing to the first."""
    linear, _, device = implementation(name)
    x = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1]], device=device)
    y = linear(x, torch.eye(3, device=device), 0.5, None, None, None)
    assert torch.equal(y.cpu(), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nan_and_infinity_surface_in_their_row_only(name, bad):
    linear, swiglu, device = implementation(name)
    d = data(3, 77, 130, device=device)
    d["x"][1, 40] = bad
    y = linear(d["x"], d["w"], 0.7, d["scale"], None, None).cpu()
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    h = swiglu(d["x"], d["w"].T.contiguous(), d["w"].T.contiguous(), torch.ones(130, device=device)).cpu()
    assert not h[1].isfinite().all()
    assert h[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_results_are_the_same_bits_each_time_and_scratch_is_left_clean(name):
    linear, _, device = implementation(name)
    d = data(1, 500, 300, device=device)
    first = linear(d["x"], d["w"], 0.7, d["scale"], (d["up_t"], d["down"]), None)
    for _ in range(3):
        assert torch.equal(linear(d["x"], d["w"], 0.7, d["scale"], (d["up_t"], d["down"]), None), first)


@pytest.mark.parametrize("chunk", [16, 80, 250, 500])
@pytest.mark.parametrize("threshold_tensor", [False, True])
def test_triton_splits(chunk, threshold_tensor):
    implementation("triton")
    from kit.kernels.sparse_matvec import launch

    d = data(2, 500, 300, device=DEVICE, rank=5)
    threshold = torch.tensor([0.7], device=DEVICE) if threshold_tensor else 0.7
    cut = launch.Cut(depth=4, groups=4, chunk=chunk)
    y = launch.sparse_linear(d["x"], d["w"], threshold, d["scale"], (d["up_t"], d["down"]), d["bias"], cut=cut)
    expected = formula(d["x"], d["w"], 0.7, d["scale"], (d["up_t"], d["down"]), d["bias"])
    close(y, expected, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(256, 256, 130), (512, 77)])
def test_linears_side_by_side_have_masks_of_their_own(sizes, rows):
    parts = [data(rows, 77, size, seed=i, device=DEVICE) for i, size in enumerate(sizes)]
    x, bounds = parts[0]["x"], tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))
    together = {name: torch.cat([part[name] for part in parts], -1).contiguous() for name in ("w", "bias")}
    thresholds = torch.tensor([0.2, 0.7, 1.1][: len(sizes)], device=DEVICE)
    scales = torch.stack([part["scale"] for part in parts])
    each = [formula(x, p["w"], float(t), p["scale"], bias=p["bias"]) for p, t in zip(parts, thresholds, strict=True)]
    expected, options = torch.cat(each, 1), {"bias": together["bias"]}
    close(sparse_linears(x, together["w"], bounds, thresholds, scales, **options), expected, torch.float32)
    if HAS_TRITON:
        from kit.kernels.sparse_matvec import launch

        y = launch.sparse_linear(x, together["w"], thresholds, scales, bounds=bounds, **options)
        close(y, expected, torch.float32)
        cut = launch.Cut(columns=128, groups=4, depth=4, warps=4, chunk=32)
        y = launch.sparse_linear(x, together["w"], thresholds, scales, bounds=bounds, cut=cut, **options)
        close(y, expected, torch.float32)


# ---- weights in 4 bits


def test_four_bits_round_to_the_nearest_and_unpack_to_the_formula():
    w = data(1, 12, 10)["w"]
    packed, scales = reference.quantize_int4(w, 4)
    back = reference.dequantize_int4(packed, scales)
    for k in range(12):
        for n in range(10):
            step = float(w[k - k % 4 : k - k % 4 + 4, n].abs().max()) / 7
            nearest = min(range(-8, 8), key=lambda c, k=k, n=n, step=step: abs(float(w[k, n]) - c * step))
            assert float(back[k, n]) == pytest.approx(nearest * step, rel=1e-6, abs=1e-9)
            nibble = int(packed[k, n % 5]) >> (4 if n >= 5 else 0) & 15
            assert nibble - 8 == nearest
    for shape, group in (((12, 10), 5), ((12, 9), 4)):
        with pytest.raises(ValueError, match="group"):
            reference.quantize_int4(torch.ones(shape), group)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 512, 64), (96, 130, 32), (256, 66, 128), (8, 2, 8)])
def test_int4_linear_is_the_formula(inputs, outputs, group, rows):
    implementation("triton")
    from kit.kernels.sparse_matvec import launch

    d = data(rows, inputs, outputs, device=DEVICE)
    packed, scales = reference.quantize_int4(d["w"], group)
    w = reference.dequantize_int4(packed, scales)
    for threshold in (torch.tensor([0.7], device=DEVICE), -1.0, math.inf):
        expected = formula(d["x"], w, float(threshold), d["scale"], bias=d["bias"])
        cut = launch.Cut(columns=32, depth=4, groups=4, chunk=max(inputs // 3, 1))
        for more in ({}, {"cut": cut}):
            y = launch.sparse_linear_int4(d["x"], packed, scales, threshold, d["scale"], d["bias"], **more)
            close(y, expected, torch.float32)
    close(reference.sparse_linear_int4(d["x"], packed, scales, 0.7), formula(d["x"], w, 0.7), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int4_linear_in_every_dtype_and_through_the_dispatch(dtype):
    d = data(2, 128, 600, dtype, device=DEVICE)
    packed, scales = reference.quantize_int4(d["w"], 32)
    w = reference.dequantize_int4(packed, scales)
    expected = formula(d["x"], w, 0.7, d["scale"], bias=d["bias"])
    y = sparse_linear_int4(d["x"][None], packed, scales, 0.7, d["scale"], bias=d["bias"])
    assert y.shape == (1, 2, 600)
    close(y[0], expected, dtype)
    if HAS_TRITON:
        from kit.kernels.sparse_matvec import launch

        y = launch.sparse_linear_int4(d["x"], packed, scales, 0.7, d["scale"], d["bias"])
        close(y, expected, dtype)
        assert torch.equal(y, launch.sparse_linear_int4(d["x"], packed, scales, 0.7, d["scale"], d["bias"]))


# ---- output-sparse gate and up


def swiglu_formula(x, gate, up, thresholds):
    """One output at a time, in float64; also how far each |a| is from its threshold."""
    out = torch.zeros(x.shape[0], gate.shape[0], dtype=torch.float64)
    margin = torch.zeros_like(out)
    for row in range(x.shape[0]):
        for n in range(gate.shape[0]):
            g = float(gate[n].double() @ x[row].double())
            a = g / (1 + math.exp(-g))
            margin[row, n] = abs(abs(a) - thresholds[n])
            if abs(a) > thresholds[n]:
                out[row, n] = a * float(up[n].double() @ x[row].double())
    return out, margin


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_swiglu_is_the_formula(name, rows, dtype):
    _, swiglu, device = implementation(name, dtype)
    for inputs, outputs in [(77, 130), (1, 1), (300, 33)]:
        d = data(rows, inputs, outputs, dtype)
        gate, up = d["w"].T.contiguous(), data(rows, inputs, outputs, dtype, seed=1)["w"].T.contiguous()
        thresholds = torch.rand(outputs, generator=torch.Generator().manual_seed(2)) * 0.6
        h = swiglu(*(t.to(device) for t in (d["x"], gate, up, thresholds))).double().cpu()
        expected, margin = swiglu_formula(d["x"], gate, up, thresholds)
        clear = margin > BOUNDS[dtype]  # rounding decides about the others
        assert clear.double().mean() > 0.9 or outputs == 1
        assert torch.equal((h == 0) & clear, (expected == 0) & clear)
        assert ((h - expected).abs() * clear).max() <= 2 * BOUNDS[dtype] * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_swiglu_all_and_nothing_kept(name):
    _, swiglu, device = implementation(name)
    d = data(2, 77, 130, device=device)
    gate, up = d["w"].T.contiguous(), data(2, 77, 130, seed=1, device=device)["w"].T.contiguous()
    dense = torch.nn.functional.silu(d["x"] @ gate.T) * (d["x"] @ up.T)
    close(swiglu(d["x"], gate, up, torch.full((130,), -1.0, device=device)), dense.double().cpu(), torch.float32)
    nothing = swiglu(d["x"], gate, up, torch.full((130,), math.inf, device=device))
    assert torch.equal(nothing.cpu(), torch.zeros(2, 130))


# ---- dispatch


@pytest.mark.parametrize("shape", [(77,), (1, 1, 77), (2, 2, 77), (2, 9, 77), (0, 77)])
def test_dispatch_keeps_leading_dims_and_equals_the_reference(shape):
    d = data(1, 77, 130, device=DEVICE)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    options = {"low_rank": (d["up_t"], d["down"]), "bias": d["bias"]}
    y = sparse_linear(x, d["w"], 0.7, d["scale"], **options)
    torch.testing.assert_close(y, reference.sparse_linear(x, d["w"], 0.7, d["scale"], **options))
    gate, thresholds = d["w"].T.contiguous(), torch.full((130,), 0.2, device=DEVICE)
    h = sparse_swiglu(x, gate, gate, thresholds)
    torch.testing.assert_close(h, reference.sparse_swiglu(x, gate, gate, thresholds))


def test_shapes_that_do_not_fit_are_refused_before_any_address_is_read():
    d = data(1, 77, 130)
    for change in ({"x": d["x"][:, :76]}, {"scale": d["scale"][:76]}, {"bias": d["bias"][:7]}, {"up_t": d["up_t"][:2]}):
        e = d | change
        with pytest.raises(RuntimeError):
            sparse_linear(e["x"], e["w"], 0.7, e["scale"], low_rank=(e["up_t"], e["down"]), bias=e["bias"])
    gate, thresholds = d["w"].T.contiguous(), torch.ones(130)
    for x, up, limit in (
        (d["x"][:, :76], gate, thresholds),
        (d["x"], gate[:9], thresholds),
        (d["x"], gate, thresholds[:9]),
    ):
        with pytest.raises(RuntimeError):
            sparse_swiglu(x, gate, up, limit)


def test_gradients_are_those_of_the_masked_product():
    d = data(2, 77, 130)
    x, w = d["x"].requires_grad_(), d["w"].requires_grad_()
    sparse_linear(x, w, 0.7, d["scale"]).sum().backward()
    keep = (d["x"].abs() * d["scale"] > 0.7).float()
    torch.testing.assert_close(x.grad, keep * w.sum(1))
    torch.testing.assert_close(w.grad, (d["x"] * keep).sum(0)[:, None].expand(-1, 130))


def test_compiled_graphs_hold_the_products_as_single_nodes():
    d = data(1, 77, 130)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    gate, thresholds = d["w"].T.contiguous(), torch.full((130,), 0.2)

    def model(x):
        return sparse_linear(x, d["w"], 0.7, d["scale"]), sparse_swiglu(x, gate, gate, thresholds)

    with torch.no_grad():
        y, h = torch.compile(model, backend=backend, fullgraph=True)(d["x"])
        torch.testing.assert_close((y, h), model(d["x"]))
    assert sum("sparse_linear" in name for name in seen) == 1
    assert sum("sparse_swiglu" in name for name in seen) == 1


def test_without_a_compiler_one_warning_and_the_same_result(tmp_path):
    script = """
import sys, warnings, torch
from kit.kernels.sparse_matvec import sparse_linear
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x, w = torch.tensor([[1.0, 0.1]]), torch.eye(2)
    for _ in range(2):
        assert torch.equal(sparse_linear(x, w, 0.5), torch.tensor([[1.0, 0.0]]))
ours = [w for w in seen if "masked dense" in str(w.message)]
assert len(ours) == 1 and "no-such-compiler" in str(ours[0].message), seen
"""
    environment = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    run_python(script, environment)


def test_the_library_is_built_once_and_the_bundle_runs_without_kit(tmp_path):
    if cpu_kernel.library() is None:
        pytest.skip("no compiler")
    write_code(tmp_path, "kit.kernels.sparse_matvec")
    package = tmp_path / "flat"
    package.mkdir()
    for file in tmp_path.glob("kit_*.py"):
        file.rename(package / file.name)
    (package / "__init__.py").touch()
    script = """
import sys
sys.modules["kit"] = None
import torch
from flat.kit_kernels_sparse_matvec import sparse_linear, library
assert torch.equal(sparse_linear(torch.tensor([[1.0, 0.1]]), torch.eye(2), 0.5), torch.tensor([[1.0, 0.0]]))
assert library() is not None
"""
    for _ in range(2):
        run_python(script, {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)})
    built = list((tmp_path / "cache" / "kit" / "kernels").iterdir())
    assert [file.suffix for file in built] == [".so"]


def run_python(script, environment):
    path = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        cwd=path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
