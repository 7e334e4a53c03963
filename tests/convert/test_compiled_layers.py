"""Compiled decoder layers give the losses and gradients of plain ones; what cannot be compiled runs as it is."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kit.convert.data import TokenRows
from kit.convert.distill import compiled_layers, logit_loss
from kit.convert.progress import Progress
from kit.convert.recipe import TrainRun
from kit.modules import modeling
from kit.modules.linear_attention import branch_weights
from kit.recipes import load_recipes

LENGTH = 48


def make(kinds, family="Llama", **change):
    types = ["full_attention" if kind == "full" else "hybrid_sliding" for kind in kinds]
    config = getattr(modeling, f"Kit{family}Config")(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": len(kinds), "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "layer_types": types, "sliding_window": 10,
           "tie_word_embeddings": True,
           "linear_attention": {"mixers": kinds, "num_sinks": 2, "feature_dim": 8, "window_size": 12}} | change
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # distributions that differ
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "linear_attention" not in n}
    return model, logit_loss(model, base)


def ids():
    return torch.randint(4, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model, loss_of, *inputs):
    loss = loss_of(*inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), dict(zip(names, grads, strict=True))


@pytest.fixture
def graphs(monkeypatch):
    """What the compiler is given; it runs it through AOTAutograd, or as the list says."""
    seen, real = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def compile(function, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        return real(function, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile)
    yield seen
    torch._dynamo.reset()


def same(a, b):
    torch.testing.assert_close(a[0], b[0])
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], msg=name)


@pytest.mark.parametrize(
    ("kinds", "kinds_of_graphs"),
    [
        (["hybrid"] * 4, 2),  # as the teacher and as the student
        (["hybrid", "full", "hybrid", "full"], 4),
        (["gated"] * 3, 2),
        (["linear", "window", "linear"], 4),
    ],
)
def test_equal_layers_are_compiled_once_and_give_the_same(kinds, kinds_of_graphs, graphs):
    model, loss_of = make(kinds)
    want = run(model, loss_of, ids())
    said = []
    with compiled_layers(model, lambda: run(model, loss_of, ids()), said.append):
        assert len(graphs) == kinds_of_graphs
        same(run(model, loss_of, ids()), want)
        assert len(graphs) == kinds_of_graphs
        with branch_weights(model, 1.0, 0.0):  # what a pass without windows runs is another program
            dropped = run(model, loss_of, ids())
    with branch_weights(model, 1.0, 0.0):
        same(dropped, run(model, loss_of, ids()))
    assert not said
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Olmo2"])
def test_other_families_are_compiled_too(family, graphs):
    model, loss_of = make(["hybrid"] * 3, family)
    want, said = run(model, loss_of, ids()), []
    with compiled_layers(model, lambda: None, said.append):
        same(run(model, loss_of, ids()), want)
    assert not said
    assert graphs


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_distillation_with_compiled_layers_takes_the_same_steps(parameters, graphs):
    where = torch.arange(LENGTH).expand(6, -1).contiguous()
    rows = TokenRows(torch.randint(4, 96, (6, LENGTH), generator=torch.Generator().manual_seed(2)), where, 6, "", "")
    losses = {}
    for compiles in ("false", "true"):
        model, _ = make(["hybrid"] * 2)
        settings = ["distill.steps=5", "distill.batch_size=2", "distill.learning_rate=1e-3", "distill.linear_steps=2"]
        settings += [f"distill.compile={compiles}", f"distill.parameters={parameters}"]
        recipe = load_recipes("lolcats", settings)[0]
        torch.manual_seed(0)  # of the adapters
        run = TrainRun(lambda model=model: SimpleNamespace(resident=lambda: model), rows, "cpu", Progress(), None, None)
        losses[compiles] = recipe.logit_distillation(run)["losses"]
        assert bool(graphs) == (compiles == "true")
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


def test_packed_rows_run_through_plain_layers(graphs):
    model, loss_of = make(["hybrid"] * 2)
    positions = (torch.arange(LENGTH) % 20).expand(2, -1)
    want = run(model, loss_of, ids(), positions)
    with compiled_layers(model, lambda: None, print):
        same(run(model, loss_of, ids(), positions), want)
    assert not graphs


@pytest.mark.parametrize("when", ["in the attempt", "later"])
def test_layers_that_cannot_be_compiled_run_as_they_are_and_say_so_once(when, graphs, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    model, loss_of = make(["hybrid"] * 2)
    want, said = run(model, loss_of, ids()), []
    attempt = (lambda: run(model, loss_of, ids())) if when == "in the attempt" else lambda: None
    with compiled_layers(model, attempt, said.append):
        same(run(model, loss_of, ids()), want)
    assert said == ["layers could not be compiled (no compiler): they run as they are, which is slower"]


def test_an_attempt_that_fails_backwards_ends_compiling(graphs):
    model, loss_of = make(["hybrid"] * 2)
    said = []

    def attempt():
        raise RuntimeError("strides")

    with compiled_layers(model, attempt, said.append):
        run(model, loss_of, ids())
    assert not graphs
    assert len(said) == 1
