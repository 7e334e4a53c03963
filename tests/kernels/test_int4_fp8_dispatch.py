"""Operations go through torch where somebody looks, and launches through Triton where a kernel is not known."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kit.kernels.int4_fp8 import dispatch
from kit.kernels.int4_fp8.dispatch import ceil_div, launch, operation, power_of_two


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def double():
    calls = []

    @operation("kit_test_dispatch::double", ("count",))
    def double(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        calls.append(type(x))
        count.add_(1)
        return 2 * x

    @double.register_fake
    def _(x, count):
        return x.new_empty(x.shape)

    double.calls = calls
    return double


def test_a_call_that_nobody_sees_is_the_function_itself(double, monkeypatch):
    monkeypatch.setattr(type(double.registered), "__call__", lambda *_: pytest.fail("asked torch"))
    x, count = torch.arange(3.0), torch.zeros(())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert double(x, count).tolist() == [0, 2, 4]
    assert int(count) == 2


def test_modes_subclasses_and_the_compiler_see_an_operation(double):
    x, count = torch.arange(3.0), torch.zeros(())
    with torch.no_grad(), Seen() as seen:
        double(x, count)
    assert "kit_test_dispatch::double" in seen.names
    double.calls.clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(count)
    with torch.no_grad():
        assert double(*fake).shape == (3,)  # outside of the mode, by what it is
    assert not double.calls
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert torch.compile(lambda x: double(x, count), backend=keep, fullgraph=True)(x).tolist() == [0, 2, 4]
    assert any("kit_test_dispatch.double" in str(node.target) for node in graphs[0].graph.nodes)


def test_gradients_are_not_lost_without_a_word(double):
    x = torch.arange(3.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="kit_test_dispatch"):
        double(x, torch.zeros(())).sum().backward()


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
