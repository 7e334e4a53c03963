"""The training loop: a killed one goes on as if nothing had been, and rows count by their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kit.convert.errors import ExitCode, KitError
from kit.convert.progress import Progress
from kit.convert.recipe import TrainConfig
from kit.convert.train import fit

STEPS, ROWS = 13, 10


class Interrupt(Progress):
    """A progress that interrupts after so many updates."""

    def __init__(self, after):
        self.left = after

    def step(self, advance=1, **values):
        self.left -= advance
        if self.left == 0:
            raise KeyboardInterrupt


def problem():
    """A small regression with dropout, so that the random state matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    x, y = torch.randn(ROWS, 4), torch.randn(ROWS, 1)
    return model, lambda rows: (model(x[rows]) - y[rows]).square().mean()


def train(checkpoint, progress=None, loss_of=None, model=None, **change):
    if model is None:
        model, loss_of = problem()
    options = {"steps": STEPS, "batch_size": 4, "learning_rate": 0.05, "micro_batch_size": 2} | change
    torch.manual_seed(1)
    settings = {"seed": 3, "device": "cpu", "name": "training", "checkpoint": checkpoint, "save_every": 4}
    losses = fit(model.parameters(), loss_of, ROWS, TrainConfig(**options), progress=progress or Progress(), **settings)
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def uninterrupted():
    return train(None)


@pytest.mark.parametrize("after", [1, 5, 8, 12])
def test_an_interrupted_training_goes_on_to_the_same_losses_and_weights(after, uninterrupted, tmp_path):
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(state, Interrupt(after))
    losses, weights = train(state)
    assert losses == uninterrupted[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, uninterrupted[1], strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("calls", [1, 2, 17, 18])
def test_an_interrupt_within_an_update_repeats_that_update(calls, uninterrupted, tmp_path):
    model, loss_of = problem()
    done = []

    def interrupted(rows):
        loss = loss_of(rows)
        done.append(rows)
        if len(done) == calls:  # the dropout of this update has been drawn
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state", model=model, loss_of=interrupted)
    assert (tmp_path / "state").exists() == (calls > 2)
    assert train(tmp_path / "state")[0] == uninterrupted[0]


def test_a_kill_loses_what_came_after_the_last_save(uninterrupted, tmp_path):
    """Nothing is written when the process dies; the file of update 8 is what is left."""
    state = tmp_path / "state"
    model, loss_of = problem()
    left = [10 * 2]

    def dies(rows):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return loss_of(rows)

    with pytest.raises(MemoryError):
        train(state, model=model, loss_of=dies)
    assert load_file(state)["0.step"] == 8
    assert train(state)[0] == uninterrupted[0]


def test_a_gradient_that_is_not_finite_stops_before_it_is_taken():
    parameter = nn.Parameter(torch.zeros(3))
    config = TrainConfig(steps=2, batch_size=1, learning_rate=0.1)
    with pytest.raises(KitError, match="norm of the gradient of training is"):
        fit([parameter], lambda rows: parameter.sqrt().sum(), 4, config, seed=0, device="cpu", name="training",
            progress=Progress())  # fmt: skip
    assert torch.equal(parameter.detach(), torch.zeros(3))


def test_a_finished_training_takes_no_further_step(uninterrupted, tmp_path):
    train(tmp_path / "state")
    model, _ = problem()
    losses, weights = train(tmp_path / "state", model=model, loss_of=None)
    assert losses == uninterrupted[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, uninterrupted[1], strict=True))


def test_the_state_of_another_training_is_refused(tmp_path):
    state = tmp_path / "state"
    train(state)
    with pytest.raises(KitError, match="its options, seed or data are others") as caught:
        train(state, learning_rate=0.01)
    assert caught.value.exit_code == ExitCode.USAGE
    other = nn.Linear(4, 2)
    with pytest.raises(KitError, match="its parameters are others"):
        train(state, model=other, loss_of=None)
    save_file({"a": torch.zeros(1)}, state, metadata={"training": json.dumps({})})
    with pytest.raises(KitError, match="cannot be taken up"):
        train(state)
    state.write_bytes(b"no safetensors")
    with pytest.raises(KitError, match="cannot be taken up"):
        train(state)


def test_a_process_that_trained_in_another_precision_trains_here(uninterrupted):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")  # accelerate keeps the first settings of a process
    assert train(None)[0] == uninterrupted[0]


def test_rows_count_by_their_weights():
    """Rows without labels have no mean; the others count as often as they have labels, whatever the micro batch."""
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    values = torch.tensor([float("nan"), 2.0, 6.0, float("nan")])
    parameter = nn.Parameter(torch.zeros(()))

    def loss(rows):
        return values[rows][weights[rows] > 0].mean() + 0 * parameter

    options = TrainConfig(steps=1, batch_size=4, micro_batch_size=1)
    settings = {"seed": 0, "device": "cpu", "name": "training", "progress": Progress()}
    assert fit([parameter], loss, 4, options, row_weights=weights, **settings) == [pytest.approx((2 + 3 * 6) / 4)]


def test_parameters_have_rates_of_their_own():
    """Without warm-up, AdamW's first step moves every weight by its rate, whatever the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainConfig(steps=1, batch_size=ROWS, learning_rate=0.5, warmup_ratio=0)
    x = torch.randn(ROWS, 4)
    rates = [1e-2, 1e-3, 1e-2, 1e-3]
    fit(
        model.parameters(),
        lambda rows: model(x[rows]).square().mean(),
        ROWS,
        config,
        seed=0,
        device="cpu",
        name="t",
        progress=Progress(),
        rates=rates,
    )
    for parameter, was, rate in zip(model.parameters(), before, rates, strict=True):
        torch.testing.assert_close((parameter - was).abs(), torch.full_like(was, rate), rtol=1e-3, atol=1e-6)
