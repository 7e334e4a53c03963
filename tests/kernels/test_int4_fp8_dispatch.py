"""Launches go through Triton where a kernel is not known."""

import torch

from kit.kernels.int4_fp8 import dispatch
from kit.kernels.int4_fp8.dispatch import ceil_div, launch, power_of_two


class Kernel:
    """As Triton's: `kernel[grid](...)` looks a compiled kernel up and returns it; that one takes all arguments."""

    arg_names = ("x", "y", "count", "scale", "BLOCK", "FLAG")

    def __init__(self, interpreted=False):
        self.looked_up, self.ran, self.interpreted = 0, [], interpreted

    def __getitem__(self, grid):
        def first(*args, **options):
            self.looked_up += 1
            self.ran.append((grid, args, (options["BLOCK"], options["FLAG"])))
            return None if self.interpreted else Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert len(grid) == 3
        return lambda *args: self.kernel.ran.append((grid, args[:4], args[4:]))


def test_a_kernel_is_looked_up_once_for_all_that_it_may_be_compiled_for(monkeypatch):
    monkeypatch.setattr(dispatch, "_compiled", {})
    kernel, x = Kernel(), torch.zeros(64)
    y = torch.zeros(64)

    def go(x=x, y=y, count=16, scale=0.5, warps=4, **constants):
        constants = {"FLAG": True, "BLOCK": 32} | constants
        launch(kernel, (5, 2), x, y, count, scale, **constants, num_warps=warps)
        grid, args, values = kernel.ran[-1]
        assert grid[:2] == (5, 2)
        assert all(a is b for a, b in zip(args, (x, y, count, scale), strict=True))
        assert values == (constants["BLOCK"], constants["FLAG"])
        return kernel.looked_up

    assert [go(), go(), go(torch.ones(64)), go(scale=0.25), go(x[4:], y)] == [1] * 5  # 16 bytes on
    different = [
        {"count": 17}, {"count": 1}, {"x": x[1:]}, {"y": y[2:]}, {"x": x.half()}, {"warps": 8}, {"BLOCK": 64},
        {"FLAG": False}, {"scale": 1}, {"x": x[1:], "y": y[1:]},
    ]  # fmt: skip
    for number, change in enumerate(different, start=2):
        assert [go(**change), go(**change)] == [number] * 2, change
    assert go() == len(different) + 1


def test_interpreted_kernels_are_not_remembered_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_compiled", {})
    monkeypatch.setattr(dispatch, "REMEMBERED", 3)
    interpreted, kernel, x = Kernel(interpreted=True), Kernel(), torch.zeros(8)
    for count in (1, 1, 2):
        launch(interpreted, (1,), x, x, count, 0.5, BLOCK=1, FLAG=True)
    assert interpreted.looked_up == 3
    assert not dispatch._compiled
    for count in range(8):
        launch(kernel, (1,), x, x, count, 0.5, BLOCK=1, FLAG=True)
        assert len(dispatch._compiled) <= 3
    assert kernel.looked_up == 8


def test_sizes_are_rounded_as_triton_rounds_them():
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
