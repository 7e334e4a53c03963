"""Gated linear attention on Triton: launches of the recurrence, registered with torch.library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention import blocks, feature_kernel, recurrence_kernel
from kit.kernels.linear_attention.launch import (
    Blocks,
    check_dims,
    empty_like_heads,
    namespace,
    num_splits,
    over_groups,
    row_products,
    rows_contiguous,
    scan,
    triton,
)

NAMESPACE = namespace(__file__, blocks.__file__, feature_kernel.__file__, recurrence_kernel.__file__)
FEATURE_ROWS = 64


@dataclass
class _Call:
    """What the launches of one forward or backward pass share.

    `through` is what `cumulate_gates` makes, None without gates; `rows` is T.
    """

    rows_a_block: int
    through: Tensor | None
    bounds: Tensor | None
    heads: int
    rows: int
    batch: int

    @property
    def sequences(self) -> int:
        return self.batch if self.bounds is None else self.bounds.shape[0]

    @property
    def num_blocks(self) -> int:
        return triton.cdiv(self.rows, self.rows_a_block)

    @property
    def num_kept(self) -> int:
        return triton.cdiv(self.num_blocks, recurrence_kernel.KEEP_EVERY.value)

    def split(self, cut: Blocks, width: int) -> tuple[int, int]:
        """How many splits a sequence has, and blocks a split."""
        return num_splits(self.sequences * self.heads * (width // cut.values), self.rows, cut.rows)

    def run(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *,
        reverse: bool = False,
        scale: float = 1.0,
        normalize: bool = False,
        weight: tuple[str, Tensor] | None = None,
        extra: tuple[str, Tensor] | None = None,
        first: tuple[Tensor, Tensor] | None = None,
        shared: bool = False,
        want_last: bool = True,
        gate_terms: str = "",
        companion: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One recurrence (see recurrence_kernel.py) through all its splits.

        Args:
            x, y: (B, X, T, K) and (B, Y, T, K), X and Y dividing H.
            z: (B, Z, T, V).
            reverse, scale, normalize: as the kernel has them.
            weight, extra: ("x" or "y", (B, H, T)).
            first: the state to start from, (N, H, V, K), and its sums (N, H, K) or, with `extra`, (N, H, V).
            shared: heads' outputs will be added up, so keep them in fp32.
            want_last: whether the state after the last block is used.
            gate_terms: "q", "k" or "v"; with `companion` (B, C, T, V) and `parts`, outputs of the kernel by name.

        Returns:
            (B, H, T, V), the mass (B, H, T) if normalized, and the state and its sums after the last block.
        """
        keys, width = x.shape[-1], z.shape[-1]
        cut = Blocks.recurrence(z.dtype, keys, width)
        splits, split_blocks = self.split(cut, width)
        fp32: Any = {"dtype": torch.float32, "device": x.device}
        out = empty_like_heads(torch.empty(0, dtype=torch.float32 if shared else z.dtype, device=x.device).expand(self.batch, self.heads, self.rows, 0), width, fill=self.bounds is not None)  # fmt: skip
        mass = torch.empty(self.batch, self.heads, self.rows, **fp32) if normalize else None
        unused = torch.empty(1, **fp32)
        parts = parts or {}
        sum_width = width if extra is not None else keys
        last = torch.empty(self.sequences, self.heads, width, keys, **fp32)
        last_sum = torch.empty(self.sequences, self.heads, sum_width, **fp32)
        has_sums = normalize or extra is not None

        def launch(state_only: bool, states: Tensor, sums: Tensor, decays: Tensor, to: tuple[Tensor, Tensor], start: bool):
            recurrence_kernel.recurrence[(width // cut.values, self.heads, self.sequences * splits)](
                x, y, z, unused if self.through is None else self.through, unused if weight is None else weight[1],
                extra[1] if extra is not None else parts.get("extra", unused), z if companion is None else companion,
                unused if self.bounds is None else self.bounds, states, sums, out, unused if mass is None else mass,
                *(parts.get(name, unused) for name in ("row_products", "block_states", "block_sums", "pairs", "across")),
                decays, *to, *(s for t in (x, y, z, z if companion is None else companion, out) for s in t.stride()[:3]),
                self.heads, *(self.heads // t.shape[1] for t in (x, y, z, z if companion is None else companion)),
                scale, self.batch * self.heads * self.rows, self.rows, splits, split_blocks, self.num_kept,
                REVERSE=reverse, MASKED=self.bounds is not None or self.rows % cut.rows != 0,
                HAS_BOUNDS=self.bounds is not None, HAS_GATE=self.through is not None, HAS_STATE=start,
                STATE_ONLY=state_only, NORMALIZE=normalize, WEIGHTED="" if weight is None else weight[0],
                EXTRA="" if extra is None else extra[0], GATE_TERMS="" if state_only else gate_terms,
                STORE_LAST=not state_only and splits == 1 and want_last, SKIP_END=state_only and not want_last, HALF=keys // 2, V=width, BV=cut.values, BT=cut.rows,
                PRECISION=cut.precision, num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip

        if splits == 1:
            states, sums = first or (unused, unused)
            launch(False, states, sums, unused, (last, last_sum), first is not None)
            return out, mass, last, last_sum
        states = torch.empty(self.sequences, splits, self.heads, width, keys, **fp32)
        sums = torch.empty(self.sequences, splits, self.heads, sum_width, **fp32)
        decays = torch.empty(self.sequences, splits, self.heads, **fp32)
        launch(True, unused, unused, decays, (states, sums), False)
        for part, end, number in ((states, last, 0), (sums, last_sum, 1))[: 2 if has_sums else 1]:
            scan(part, None if self.through is None else decays, None if first is None else first[number], end, reverse)
        launch(False, states, sums, unused, (unused, unused), True)
        return out, mass, last, last_sum


def _prepare(q: Tensor, v: Tensor, features: int, log_gate: Tensor | None, bounds: Tensor | None) -> _Call:
    batch, heads, rows = q.shape[:3]
    cut = Blocks.recurrence(v.dtype, features, v.shape[-1])
    call = _Call(cut.rows, None, bounds, heads, rows, batch)
    if log_gate is not None:
        call.through = torch.zeros(batch, heads, rows, dtype=torch.float32, device=q.device)
        recurrence_kernel.cumulate_gates[(call.sequences * call.num_blocks, heads)](
            log_gate, log_gate if bounds is None else bounds, call.through, *log_gate.stride()[:2], rows, call.num_blocks,
            HAS_BOUNDS=bounds is not None, BT=cut.rows, num_warps=1,
        )  # fmt: skip
    return call


def _map(x: Tensor, maps: Tensor, heads: int) -> Tensor:
    """φ(x), (B, heads, T, F), of x (B, X, T, D) with maps (M, D, F/2): heads is M."""
    batch, _, rows, dim = x.shape
    out = torch.empty(batch, heads, rows, 2 * maps.shape[-1], dtype=x.dtype, device=x.device)
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
    feature_kernel.map_forward[(triton.cdiv(rows, FEATURE_ROWS), heads, batch)](
        x, maps, out, *x.stride()[:3], 1, rows, DIM=dim, HALF=maps.shape[-1], BT=FEATURE_ROWS,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out


def _map_gradient(x: Tensor, maps: Tensor, d_phi: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, X, T, D) and of maps (M, D, F/2), from that of φ(x) (B, M, T, F)."""
    batch, heads, rows = d_phi.shape[:3]
    dim, half = maps.shape[1:]
    wide = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
    d_x = torch.empty(batch, heads, rows, dim, dtype=x.dtype, device=x.device)
    blocks_each = 16
    programs = triton.cdiv(rows, FEATURE_ROWS * blocks_each)
    d_maps = torch.empty(batch, programs, heads, dim, half, dtype=torch.float32, device=x.device)
    feature_kernel.map_backward[(programs, heads, batch)](
        wide, maps, d_phi.contiguous(), d_x, d_maps, *wide.stride()[:3], 1, rows, blocks_each, DIM=dim, HALF=half,
        BT=FEATURE_ROWS if x.dtype != torch.float32 else 32,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=8,
    )  # fmt: skip
    return over_groups(d_x, x), d_maps.sum((0, 1)).to(maps.dtype)


@torch.library.custom_op(f"{NAMESPACE}::gated_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    map_q: Tensor | None,
    map_k: Tensor | None,
    state: Tensor | None,
    state_sum: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    normalize: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the denominators (B, H, T), and the state (N, H, V, F) and its sum (N, H, F) at the end."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if map_q is not None and map_k is not None:
        q, k = _map(q, map_q, len(map_q)), _map(k, map_k, len(map_k))
    call = _prepare(q, v, q.shape[-1], log_gate, bounds)
    first = None if state is None or state_sum is None else (state, state_sum)
    out, mass, last, last_sum = call.run(q, k, v, scale=scale, normalize=normalize, first=first, want_last=want_last)
    return out, torch.empty(0, device=q.device) if mass is None else mass, last, last_sum


@_forward.register_fake
def _(q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, scale, normalize, want_last):
    batch, heads, rows = q.shape[:3]
    features, width = q.shape[-1] if map_q is None else 2 * map_q.shape[-1], v.shape[-1]
    sequences, fp32 = batch if bounds is None else bounds.shape[0], {"dtype": torch.float32, "device": q.device}
    return (
        empty_like_heads(v.new_empty(0).expand(batch, heads, rows, 0), width, fill=False),
        torch.empty((batch, heads, rows) if normalize else 0, **fp32),
        torch.empty(sequences, heads, width, features, **fp32),
        torch.empty(sequences, heads, features, **fp32),
    )


@torch.library.custom_op(f"{NAMESPACE}::gated_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    out: Tensor,
    mass: Tensor,
    d_last: Tensor | None,
    d_last_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    map_q: Tensor | None,
    map_k: Tensor | None,
    state: Tensor | None,
    state_sum: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    normalize: bool,
    gate_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, log_gate, both maps (empty where there are none), the first state and its sum.

    With y_i = Σ_j w_ij v_j / m_i: the weights' gradient is dA_ij = r_i do_i·v_j + e_i, r = 1/m and e = -do·y/m (r = `scale`
    and e = 0 if not normalized), and each gradient is a recurrence of its own.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    x, y = q, k
    if map_q is not None and map_k is not None:
        q, k = _map(q, map_q, len(map_q)), _map(k, map_k, len(map_k))
    call = _prepare(q, v, q.shape[-1], log_gate, bounds)
    d_out = rows_contiguous(d_out.to(v.dtype))
    shape, fp32 = (call.batch, call.heads, call.rows), {"dtype": torch.float32, "device": q.device}
    if normalize:
        weight = torch.where(mass == 0, 0.0, 1.0 / mass)
        extra = row_products(d_out, out).mul_(weight).neg_()
    else:
        weight, extra = torch.full(shape, scale, **fp32), torch.zeros(shape, **fp32)
    ends = d_last is not None and d_last_sum is not None
    added = extra if normalize or ends else None
    features, width = q.shape[-1], v.shape[-1]
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    terms = ("", "", "")
    if gate_needs_grad:
        assert call.through is not None
        terms = ("q", "k", "v")
        f_terms = features // Blocks.recurrence(v.dtype, width, features).values
        v_terms = width // Blocks.recurrence(v.dtype, features, width).values
        kept = (call.sequences, call.num_kept, call.heads)
        states = torch.empty(*kept, features, width, dtype=v.dtype, device=q.device)
        sums = torch.empty(*kept, features, **fp32)
        rows_q, rows_k, pairs = (torch.zeros(n, *shape, **fp32) for n in (f_terms, f_terms, v_terms))
        across = torch.zeros(f_terms, *kept, **fp32)
        parts = [
            {"row_products": rows_q, "block_states": states, "block_sums": sums},
            {"row_products": rows_k, "block_states": states, "block_sums": sums, "across": across},
            {"pairs": pairs, "extra": extra},
        ]
    first = None if state is None or state_sum is None else (state.mT.contiguous(), state_sum)
    last = None if d_last is None or d_last_sum is None else (d_last.contiguous(), d_last_sum.contiguous())
    of_queries = None if added is None else ("x", added)
    of_keys = None if added is None else ("y", added)
    d_q, *_ = call.run(
        d_out, v, k, weight=("x", weight), extra=of_queries, first=first, want_last=False,
        gate_terms=terms[0], companion=q, parts=parts[0],
    )  # fmt: skip
    d_k, _, _, d_sum = call.run(
        v, d_out, q, reverse=True, weight=("y", weight), extra=of_keys, shared=k.shape[1] != call.heads,
        first=None if last is None else (last[0].mT.contiguous(), last[1]), want_last=state is not None,
        gate_terms=terms[1], companion=k, parts=parts[1],
    )  # fmt: skip
    d_v, _, d_state, _ = call.run(
        k, q, d_out, reverse=True, weight=("y", weight), first=last, shared=v.shape[1] != call.heads, want_last=state is not None,
        gate_terms=terms[2], companion=v, parts=parts[2],
    )  # fmt: skip
    d_gate = torch.empty(0, **fp32)
    if gate_needs_grad:
        d_gate = torch.zeros(shape, **fp32)
        recurrence_kernel.gate_gradient[(call.sequences * call.num_blocks, call.heads)](
            rows_q, rows_k, pairs, across, q if bounds is None else bounds, d_gate, d_gate.numel(), call.rows,
            call.num_blocks, TERMS=f_terms, PAIR_TERMS=v_terms, HAS_BOUNDS=bounds is not None, BT=call.rows_a_block, num_warps=1,
        )  # fmt: skip
    nothing = lambda: torch.empty(0, **fp32)  # noqa: E731  (operations may not return one tensor twice)
    d_k, d_v = over_groups(d_k, k), over_groups(d_v, v)  # k may be features: maps come after
    d_map_q, d_map_k = nothing(), nothing()
    if map_q is not None and map_k is not None:
        d_q, d_map_q = _map_gradient(x, map_q, d_q)
        d_k, d_map_k = _map_gradient(y, map_k, d_k)
    d_sum = d_sum if added is not None else torch.zeros(call.sequences, call.heads, features, **fp32)
    return d_q, d_k, d_v, d_gate, d_map_q, d_map_k, d_state, d_sum


@_backward.register_fake
def _(d_out, out, mass, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, scale, normalize, gate_needs_grad):  # fmt: skip
    sequences = len(q) if bounds is None else bounds.shape[0]
    features, fp32 = q.shape[-1] if map_q is None else 2 * map_q.shape[-1], {"dtype": torch.float32, "device": q.device}
    like = lambda x: torch.empty(0, **fp32) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    return (
        *(like(x) for x in (q, k, v, log_gate if gate_needs_grad else None, map_q, map_k)),
        torch.empty(sequences, q.shape[1], v.shape[-1], features, **fp32),
        torch.empty(sequences, q.shape[1], features, **fp32),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scale, normalize, _ = inputs
    out, mass, _, _ = output
    ctx.save_for_backward(*tensors, out, mass)
    ctx.options = (scale, normalize)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, _: Any, d_last: Tensor | None, d_last_sum: Tensor | None) -> tuple:
    q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, out, mass = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_last is not None or d_last_sum is not None:
        sequences, features = len(q) if bounds is None else len(bounds), q.shape[-1] if map_q is None else 2 * map_q.shape[-1]
        shape = (sequences, q.shape[1])
        d_last = q.new_zeros(*shape, v.shape[-1], features, dtype=torch.float32) if d_last is None else d_last
        d_last_sum = q.new_zeros(*shape, features, dtype=torch.float32) if d_last_sum is None else d_last_sum
    gate_needs_grad = log_gate is not None and ctx.needs_input_grad[3]
    grads = _backward(
        d_out, out, mass, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, *ctx.options,
        gate_needs_grad,
    )  # fmt: skip
    inputs = (q, k, v, log_gate if gate_needs_grad else None, map_q, map_k, state, state_sum)
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), *[None] * 4


_forward.register_autograd(_differentiate, setup_context=_setup)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None = None,
    feature_map_q: Tensor | None = None,
    feature_map_k: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    state: Tensor | None = None,
    bounds: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `gated_reference.gated_linear_attention`, on Triton; D, V and F of 32, 64, 128 or 256.

    Raises:
        ValueError: on other dims, naming them.
    """
    features = q.shape[-1] if feature_map_q is None else 2 * feature_map_q.shape[-1]
    check_dims(**{"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": features})
    gate = None
    if log_gate is not None:
        gate = log_gate.float().expand(q.shape[:3])
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    maps: tuple[Tensor | None, Tensor | None] = (None, None)
    if feature_map_q is not None and feature_map_k is not None:
        maps = (feature_map_q.to(q.dtype).contiguous(), feature_map_k.to(q.dtype).contiguous())
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    if state is not None:
        first = (state[..., :-1].mT.float().contiguous(), state[..., -1].float().contiguous())
    out, _, last, last_sum = _forward(
        q, k, v, gate, *maps, *first,
        None if bounds is None else bounds.to(device=q.device, dtype=torch.int32).contiguous(), float(scale), normalize,
        return_state,
    )  # fmt: skip
    if not return_state:
        return out, None
    if not normalize:  # the kernel has no need of the sums then
        raise ValueError("return_state needs normalize=True: without it there are no denominators to carry")
    return out, torch.cat([last.mT, last_sum[..., None]], -1)
