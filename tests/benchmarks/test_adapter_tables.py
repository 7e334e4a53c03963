"""The tables of the adapter benchmark, on runs whose figures are made up."""

import argparse
import json
import math

import pytest

SETTINGS = {"versions": {"torch": "2"}, "model": "m", "device": "d", "steps": 20, "batch_size": 1}
SETTINGS |= {"window": 8}


def run(method, rate, seed, likely, lost, losses, split="test"):
    of = {"split": split, "target": "facts", "method": method}
    of |= {} if method == "base" else {"learning_rate": rate, "seed": seed}
    target = {"exact": 0.5, "contains": 0.5, "token_log_likelihood": likely}
    return {"of": of, "target": target, "perplexity": 10 * math.exp(lost), "losses": losses}


def cells(text, method):
    line = next(line for line in text.splitlines() if line.startswith(f"| {method}"))
    titles = next(line for line in text.splitlines() if line.startswith("| method"))
    return dict(zip(titles.split(" | "), line.split(" | "), strict=True))


def test_losses_are_shares_of_what_the_best_lora_loses_and_steps_those_to_its_loss(script):
    falling = [2 - 0.1 * step for step in range(20)]
    faster = [1 - 0.1 * step for step in range(20)]
    runs = [
        run("base", None, None, -9.0, 0.0, []),
        run("lora", 1e-3, 0, -1.0, 0.2, falling),
        run("lora", 1e-3, 1, -1.0, 0.4, falling),
        run("lora", 1e-2, 0, -2.0, 5.0, [5.0]),
        run("kore", 1e-2, 0, -1.0, 0.06, faster),
        run("kore", 1e-2, 1, -1.0, 0.06, faster),
    ]
    text = script("adapter_tables").report(SETTINGS, {str(number): one for number, one in enumerate(runs)})
    assert cells(text, "lora, 0.001")["loss lost"] == "0.3000 ± 0.1414"
    kore = cells(text, "kore")
    assert (kore["of LoRA's"], kore["seeds"]) == ("20%", "2")
    # LoRA's last ten losses have the mean 0.55, and those of the faster run ten updates earlier.
    updates = [cells(text, name)["updates to its loss"] for name in ("lora, 0.001", "kore")]
    assert updates == ["20", "10"]
    # At the same rate, LoRA has one run of one loss, 5.0: reached with the first ten.
    assert kore["at the same rate |"] == "10 |"
    assert cells(text, "lora, 0.001")["at the same rate |"] == "20 |"


def test_rates_are_those_after_which_right_answers_are_likeliest(script):
    runs = {str(rate): run("lora", rate, 0, -abs(rate - 0.01), 0.1, [1.0], "dev") for rate in (0.001, 0.01, 0.1)}
    runs["failed"] = {"of": runs["0.1"]["of"] | {"learning_rate": 1.0}}
    assert "facts: --learning-rate lora=0.01" in script("adapter_tables").report(SETTINGS, runs)


def test_a_grid_goes_on_for_as_long_as_its_end_is_best_and_the_test_takes_the_best(script):
    adapters = script("adapters")
    options = argparse.Namespace(
        learning_rates=[3e-4, 1e-3, 3e-3], learning_rate=["pissa=7e-4"], seeds=[4, 5], widen=True
    )
    done = {}

    def asked(split, method, best=0.0):
        rates = []
        of = {"split": split, "target": "facts", "method": method}
        for wanted in adapters.wanted(options, done, of):
            rates.append((wanted["learning_rate"], wanted["seed"]))
            likely = -abs(math.log(wanted["learning_rate"] / best)) if best else 0
            done[adapters.key_of(wanted)] = run(method, *rates[-1], likely, 0.1, [1.0], split)
        return rates

    grid = [(3e-4, 4), (1e-3, 4), (3e-3, 4)]
    assert asked("dev", "lora", 3e-5) == [*grid, (1e-4, 4), (3e-5, 4), (1e-5, 4)]
    assert asked("dev", "kore", 3e-3) == [*grid, (1e-2, 4)]
    assert asked("dev", "milora", 1e-3) == grid
    assert asked("dev", "milora", 1e-3) == []  # all is done
    options.learning_rates = [1e-3]  # one rate has two ends
    assert asked("dev", "corda-kpm", 1e-3) == [(1e-3, 4), (3e-4, 4), (3e-3, 4)]
    assert asked("test", "lora") == [(3e-5, 4), (3e-5, 5)]
    assert asked("test", "pissa") == [(7e-4, 4), (7e-4, 5)]


def test_files_of_other_settings_are_not_mixed(script, tmp_path):
    for name, steps in (("a", 20), ("b", 20), ("c", 21)):
        done = {"settings": SETTINGS | {"steps": steps}, "runs": {name: {}}}
        (tmp_path / name).write_text(json.dumps(done))
    assert set(script("adapter_tables").read_runs([tmp_path / "a", tmp_path / "b"])[1]) == {"a", "b"}
    with pytest.raises(SystemExit, match="other settings"):
        script("adapter_tables").read_runs([tmp_path / "a", tmp_path / "c"])
