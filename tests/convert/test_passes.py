"""Captured passes give the gradients that plain ones give, whatever the mix of programs, shapes and micro batches."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from kit.convert import passes as module
from kit.convert.checkpoint import open_checkpoint
from kit.convert.passes import WARM, Pass, Passes
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.recipe import TrainConfig
from kit.convert.train import fit
from kit.recipes import load_recipes

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ROWS = 11


class FakeGraph:
    """Does on the CPU what a graph does: one set of inputs and of gradients, overwritten by each replay."""

    captured: ClassVar[list] = []

    def __init__(self, made, share, parameters, context, pool):
        assert all(parameter.grad is None for parameter in parameters)
        self.made, self.parameters = made, parameters
        self.inputs = {name: x.clone() for name, x in made.inputs.items()}
        loss = made.value(**self.inputs)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.grads = [None if grad is None else torch.full_like(grad, torch.nan) for grad in grads]
        FakeGraph.captured.append(made.key())

    def replay(self, made, share):
        for name, x in made.inputs.items():
            self.inputs[name].copy_(x)
        loss = self.made.value(**self.inputs) * share
        for held, grad in zip(self.grads, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
            assert (held is None) == (grad is None)
            if held is not None:
                held.copy_(grad)
        return loss.detach()


@pytest.fixture
def fake(monkeypatch):
    """Graphs on the CPU."""
    FakeGraph.captured = []
    monkeypatch.setattr(module, "_Graph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    init = Passes.__init__
    monkeypatch.setattr(Passes, "__init__", lambda self, *args, **named: init(self, *args, **named | {"graphs": True}))
    return FakeGraph


def problem(device="cpu", *, split):
    """A regression in which one weight takes part in every third row only; its rows alone are a program."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 1), "extra": nn.Linear(4, 1)}).to(device)
    x, y = torch.randn(ROWS, 4), torch.randn(ROWS, 1)

    def loss_of(rows):
        with_extra = bool((rows % 3 == 0).any())

        def value(x, y):
            out = model["head"](model["body"](x).tanh())
            return (out + model["extra"](x) - y if with_extra else out - y).square().mean()

        if split:
            return Pass(value, {"x": x[rows], "y": y[rows]}, ("extra", with_extra))
        return value(x[rows].to(device), y[rows].to(device))

    return model, loss_of


def train(device="cpu", *, split, progress=None, **options):
    model, loss_of = problem(device, split=split)
    config = TrainConfig(**{"steps": 40, "learning_rate": 0.02, "batch_size": 2} | options)
    weights = torch.arange(1.0, ROWS + 1)
    losses = fit(model.parameters(), loss_of, ROWS, config, seed=0, device=device, name="training",
                 progress=progress or Progress(), row_weights=weights)  # fmt: skip
    return losses, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"batch_size": 5, "micro_batch_size": 2}])
def test_captured_passes_train_like_plain_ones(fake, options):
    want, weights = train(split=False, **options)
    assert not fake.captured
    losses, same = train(split=True, **options)
    assert losses == pytest.approx(want, rel=1e-5)
    for a, b in zip(weights, same, strict=True):
        torch.testing.assert_close(a, b)
    assert {key[0] for key in fake.captured} == {("extra", True), ("extra", False)}
    assert len(fake.captured) == len(set(fake.captured))


@ON_GPU
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"batch_size": 5, "micro_batch_size": 2}])
def test_graphs_on_the_gpu_train_like_plain_passes(options, monkeypatch):
    graphs = []
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self, run=torch.cuda.CUDAGraph.replay: (graphs.append(self), run(self))
    )
    want, weights = train("cuda", split=False, **options)
    assert not graphs
    losses, same = train("cuda", split=True, **options)
    assert len(set(map(id, graphs))) >= 2
    assert losses == pytest.approx(want, rel=1e-3)
    for a, b in zip(weights, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_captured_runs_as_it_is_and_is_tried_once(fake, monkeypatch):
    tried, said = [], []

    def fails(*_):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    class Says(Progress):
        def log(self, message):
            said.append(message)

    monkeypatch.setattr(module, "_Graph", fails)
    assert train(split=True, progress=Says())[0] == train(split=False)[0]
    assert len(tried) == len(said) == 1
    assert "not permitted when stream is capturing)" in said[0]


def test_a_program_is_captured_after_its_first_passes_and_none_without_one(fake):
    parameter = nn.Parameter(torch.ones(2))
    runs = Passes([parameter], torch.no_grad, graphs=True, say=print)
    runs.context = torch.enable_grad

    def of(program, length=2):
        return lambda rows: Pass(lambda x: (parameter.sum() * x).sum(), {"x": torch.ones(length)}, program)

    rows = torch.arange(1)
    for _ in range(WARM + 2):
        for program, length in (("a", 2), ("a", 3), ("b", 2), (None, 2)):
            runs.backward(of(program, length), rows, 1.0, alone=False)
    assert [(key[0], key[1][1]) for key in fake.captured] == [("a", (2,)), ("a", (3,)), ("b", (2,))]
    assert torch.equal(parameter.grad, torch.full((2,), (WARM + 2) * 9.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lolcats", ["distill.linear_steps=5", "lora.steps=0"]),
        ("lolcats", ["distill.teacher=cached", "distill.window_dropout=0.5", "distill.micro_batch_size=1"]),
        ("hedgehog", []),
        ("lizard", ["distill.parameters=lora", "transfer.window_dropout=0.5"]),
    ],
)
def test_passes_of_recipes_read_nothing_but_their_inputs(fake, monkeypatch, make_model, tmp_path, name, options):
    """A graph replays its first pass on the inputs of the others: rows that it kept would show in the losses."""
    rows = ["data.num_samples=8", "data.seq_len=40", "data.packing=concat", "window_size=10", "seed=3"]
    steps = ["transfer.steps=9", "transfer.batch_size=2", "distill.steps=12", "distill.batch_size=2"]
    checkpoint, reports = open_checkpoint(str(make_model())), []
    for warm in (10**6, WARM):
        monkeypatch.setattr(module, "WARM", warm)
        recipes = load_recipes(name, [*rows, *steps, "distill.learning_rate=3e-3", *options])
        how = Options(tmp_path / str(warm), device="cpu", eval_tokens=0)
        reports.append(convert(checkpoint, recipes, how, Progress())["stages"])
        assert bool(fake.captured) == (warm == WARM)
    both = any("linear_steps" in option or "dropout" in option for option in options)
    assert {key[0] for key in fake.captured} == ({"whole", "no window"} if both else {"whole"})
    for stage, entries in reports[0].items():
        for plain, captured in zip(entries, reports[1][stage], strict=True):
            assert captured.get("losses", []) == pytest.approx(plain.get("losses", []), rel=1e-4), stage
