"""Launches of the recurrence kernel, and of Hedgehog's feature map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.feature_kernel import map_backward, map_forward
from kit.kernels.linear_attention.launch import (
    Blocks,
    empty_heads,
    gradient_like,
    num_splits,
    on_device_of,
    over_groups,
    scan,
    triton,
)
from kit.kernels.linear_attention.recurrence_kernel import KEEP_EVERY, cumulate_gates, recurrence

FEATURE_ROWS = 64
PARTS = ("row_products", "block_states", "block_sums", "across")  # outputs of the gate's gradient


@dataclass
class Recurrence:
    """What the launches of one forward or backward pass share.

    Attributes:
        batch, heads, rows: B, H and T.
        rows_a_block: how long blocks are; None takes what suits each launch.
        through: log gates (B, H, T) as `cumulate_gates` makes them, or None.
        bounds: (N, 3) row, start and end of each sequence; None is a sequence a row.
        terrace: queries do not see keys of their own block.
    """

    batch: int
    heads: int
    rows: int
    rows_a_block: int | None = None
    through: Tensor | None = None
    bounds: Tensor | None = None
    terrace: bool = False

    @property
    def sequences(self) -> int:
        """N."""
        return self.batch if self.bounds is None else self.bounds.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest sequence."""
        assert self.rows_a_block is not None
        return triton.cdiv(self.rows, self.rows_a_block)

    @property
    def num_kept(self) -> int:
        """How many of them keep their state for the gate's gradient."""
        return triton.cdiv(self.num_blocks, KEEP_EVERY.value)

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
        like: Tensor | None = None,
        add_to: Tensor | None = None,
        want_last: bool = True,
        want_out: bool = True,
        gate_terms: str = "",
        companion: Tensor | None = None,
        key_sums: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One recurrence (see recurrence_kernel.py) through all its splits.

        Args:
            x, y: (B, X, T, K) and (B, Y, T, K), X and Y dividing H.
            z: (B, Z, T, V).
            reverse, scale, normalize: as the kernel has them.
            weight, extra: ("x" or "y", (B, H, T)).
            first: the state to start from, (N, H, V, K), and its sums (N, H, K) or, with `extra`, (N, H, V).
            like: what the output is the gradient of. It is laid out like that, unless heads share it: then it is fp32
                and contiguous, to be added up.
            add_to: a gradient of `like`, to which the output is added in place unless heads share it.
            want_last: whether the state after the last block is used.
            want_out: whether anything else is.
            gate_terms: "q" or "k"; with `companion` (B, C, T, V) and `parts`, outputs of the kernel by name.
            key_sums: each block's sum of y, (B, Y, blocks, K) fp32, if it is known; without `bounds` and gates.

        Returns:
            (B, H, T, V), the mass (B, H, T) if normalized, and the state and its sums after the last block.
        """
        keys, width = x.shape[-1], z.shape[-1]
        cut = Blocks.recurrence(z.dtype, keys, width)
        if self.rows_a_block is not None and cut.rows != self.rows_a_block:
            cut = replace(cut, rows=self.rows_a_block)
        splits, split_blocks = self.split(cut, width)
        fp32: Any = {"dtype": torch.float32, "device": x.device}
        shape = (self.batch, self.heads, self.rows, width)
        fill = self.bounds is not None
        if like is None:
            out = empty_heads(shape, z.dtype, x.device, fill=fill)
        elif like.shape[1] != self.heads:
            out, add_to = (torch.zeros if fill else torch.empty)(shape, **fp32), None
        else:
            out = gradient_like(like, fill) if add_to is None else add_to
        mass = torch.empty(self.batch, self.heads, self.rows, **fp32) if normalize else None
        unused, other = torch.empty(1, **fp32), z if companion is None else companion
        parts = parts or {}
        sum_width = width if extra is not None else keys
        last = torch.empty(self.sequences, self.heads, width, keys, **fp32)
        last_sum = torch.empty(self.sequences, self.heads, sum_width, **fp32)
        has_sums = normalize or extra is not None

        def launch(
            state_only: bool, states: Tensor, sums: Tensor, decays: Tensor, to: tuple[Tensor, Tensor], start: bool
        ):
            with on_device_of(z):
                recurrence[(width // cut.values, self.heads, self.sequences * splits)](
                    x, y, z, unused if self.through is None else self.through, unused if weight is None else weight[1],
                    unused if extra is None else extra[1], other,
                    unused if key_sums is None else key_sums,
                    unused if self.bounds is None else self.bounds, states, sums, out, unused if mass is None else mass,
                    *(parts.get(name, unused) for name in PARTS), decays, *to,
                    *(stride for t in (x, y, z, other, out) for stride in t.stride()[:3]),
                    self.heads, *(self.heads // t.shape[1] for t in (x, y, z, other)), scale,
                    self.batch * self.heads * self.rows, self.rows, splits, split_blocks,
                    0 if key_sums is None else key_sums.shape[2], self.num_kept if gate_terms else 0,
                    REVERSE=reverse, MASKED=self.bounds is not None or self.rows % cut.rows != 0,
                    HAS_BOUNDS=self.bounds is not None, HAS_GATE=self.through is not None, HAS_STATE=start,
                    TERRACE=self.terrace, STATE_ONLY=state_only, NORMALIZE=normalize,
                    SUMS_GIVEN=key_sums is not None,
                    WEIGHTED="" if weight is None else weight[0], EXTRA="" if extra is None else extra[0],
                    GATE_TERMS="" if state_only else gate_terms, SKIP_END=state_only and not want_last,
                    ADD=add_to is not None and not state_only, STORE_LAST=not state_only and splits == 1 and want_last,
                    HALF=keys // 2, V=width, BV=cut.values, BT=cut.rows, PRECISION=cut.precision,
                    num_warps=cut.warps, num_stages=cut.stages,
                )  # fmt: skip

        if splits == 1 and want_out:
            states, sums = first or (unused, unused)
            launch(False, states, sums, unused, (last, last_sum), first is not None)
            return out, mass, last, last_sum
        states = torch.empty(self.sequences, splits, self.heads, width, keys, **fp32)
        sums = torch.empty(self.sequences, splits, self.heads, sum_width, **fp32)
        decays = torch.empty(self.sequences, splits, self.heads, **fp32)
        launch(True, unused, unused, decays, (states, sums), False)
        for part, end, number in ((states, last, 0), (sums, last_sum, 1))[: 2 if has_sums else 1]:
            scan(part, None if self.through is None else decays, None if first is None else first[number], end, reverse)
        if want_out:
            launch(False, states, sums, unused, (unused, unused), True)
        return out, mass, last, last_sum


def cumulated(log_gate: Tensor, bounds: Tensor | None, rows_a_block: int) -> Tensor:
    """Log gates (B, H, T) summed within each block, in base 2."""
    batch, heads, rows = log_gate.shape
    sequences, blocks = batch if bounds is None else bounds.shape[0], triton.cdiv(rows, rows_a_block)
    out = torch.zeros(batch, heads, rows, dtype=torch.float32, device=log_gate.device)
    with on_device_of(log_gate):
        cumulate_gates[(sequences * blocks, heads)](
            log_gate, log_gate if bounds is None else bounds, out, *log_gate.stride()[:2], rows, blocks,
            HAS_BOUNDS=bounds is not None, BT=rows_a_block, num_warps=1,
        )  # fmt: skip
    return out


def map_features(x: Tensor, maps: Tensor, num_zero: int = 0, rows_a_sum: int | None = None) -> tuple[Tensor, Tensor]:
    """φ(x), (B, M, T, F), of x (B, X, T, D) with maps (M, D, F/2).

    With `rows_a_sum` it is zero in the first `num_zero` rows, and the second are its sums over so many rows each,
    (B, M, blocks, F) fp32; else nobody has written that.
    """
    (batch, _, rows, dim), heads = x.shape, len(maps)
    out = torch.empty(batch, heads, rows, 2 * maps.shape[-1], dtype=x.dtype, device=x.device)
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
    block = FEATURE_ROWS if x.dtype != torch.float32 else 16  # fp32 products are unrolled: few rows compile fast
    block = block if rows_a_sum is None else rows_a_sum
    blocks = triton.cdiv(rows, block)
    sums = torch.empty(batch, heads, blocks, out.shape[-1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        map_forward[(blocks, heads, batch)](
            x, maps, out, sums, *x.stride()[:3], rows, num_zero, HAS_SUMS=rows_a_sum is not None,
            DIM=dim, HALF=maps.shape[-1], BT=block,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out, sums


def map_gradient(x: Tensor, maps: Tensor, d_phi: Tensor, add_to: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, X, T, D) and of maps (M, D, F/2), from that of φ(x) (B, M, T, F).

    The first is added to `add_to` in place, if that is given, and else laid out like x.
    """
    batch, heads, rows = d_phi.shape[:3]
    dim, half = maps.shape[1:]
    if x.dtype == torch.float32 and dim * half == 256 * 128:
        return _map_gradient_by_parts(x, maps, d_phi, add_to)
    alone = x.shape[1] == heads
    wide = x if alone else x.repeat_interleave(heads // x.shape[1], 1)
    into = add_to if alone and add_to is not None else gradient_like(wide, fill=False)
    small, blocks_each = max(dim, 2 * half) <= 128, 16  # larger tiles do not fit a multiprocessor
    block = FEATURE_ROWS if small and x.dtype != torch.float32 else 32
    programs = triton.cdiv(rows, block * blocks_each)
    d_maps = torch.empty(batch, programs, heads, dim, half, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        map_backward[(programs, heads, batch)](
            wide, maps, d_phi.contiguous(), into, d_maps, *wide.stride()[:3], *into.stride()[:3], rows, blocks_each,
            ADD=into is add_to, DIM=dim, HALF=half, BT=block,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4 if small else 8,
        )  # fmt: skip
    if not alone:
        into = over_groups(into, x)
        into = into if add_to is None else add_to.add_(into)
    return into, d_maps.sum((0, 1)).to(maps.dtype)


def _map_gradient_by_parts(x: Tensor, maps: Tensor, d_phi: Tensor, add_to: Tensor | None) -> tuple[Tensor, Tensor]:
    """`map_gradient` in PyTorch: a map of 128 KiB and its transpose are more than a multiprocessor holds."""
    wide = x.repeat_interleave(len(maps) // x.shape[1], 1)
    z = wide @ maps
    d_z = torch.zeros_like(z)
    for sign, d_half in zip((1, -1), d_phi.chunk(2, -1), strict=True):
        p = (sign * z).softmax(-1)
        d_z += sign * p * (d_half - (p * d_half).sum(-1, keepdim=True))
    d_x = over_groups(d_z @ maps.mT, x)
    return d_x if add_to is None else add_to.add_(d_x), (wide.mT @ d_z).sum(0)
