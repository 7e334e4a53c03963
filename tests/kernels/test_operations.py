"""Operations go through torch where somebody looks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kit.kernels.operations import operation


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

    @operation("kit_test_operations::double", ("count",))
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
    assert "kit_test_operations::double" in seen.names
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
    assert any("kit_test_operations.double" in str(node.target) for node in graphs[0].graph.nodes)


def test_gradients_are_not_lost_without_a_word(double):
    x = torch.arange(3.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="kit_test_operations"):
        double(x, torch.zeros(())).sum().backward()
