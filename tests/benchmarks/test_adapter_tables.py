"""The tables of the adapter benchmark, on runs whose figures are made up."""

import json
import math

import pytest

SETTINGS = {"split": "test", "versions": {"torch": "2"}, "model": "m", "device": "d", "steps": 20, "batch_size": 1}
SETTINGS |= {"window": 8}


def run(method, rate, seed, likely, lost, losses):
    of = {"target": "facts"} | ({} if method is None else {"method": method, "learning_rate": rate, "seed": seed})
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
        run(None, None, None, -9.0, 0.0, []),
        run("lora", 1e-3, 0, -1.0, 0.2, falling),
        run("lora", 1e-3, 1, -1.0, 0.4, falling),
        run("lora", 1e-2, 0, -2.0, 5.0, falling),
        run("kore", 1e-2, 0, -1.0, 0.06, faster),
        run("kore", 1e-2, 1, -1.0, 0.06, faster),
    ]
    text = script("adapter_tables").report(SETTINGS, {str(number): one for number, one in enumerate(runs)})
    assert cells(text, "lora, 0.001")["loss lost"] == "0.3000 ± 0.1414"
    kore = cells(text, "kore")
    assert (kore["of LoRA's"], kore["seeds"]) == ("20%", "2")
    # LoRA's last ten losses have the mean 0.55, and those of the faster run ten updates earlier.
    updates = [cells(text, name)["updates to its loss |"] for name in ("lora, 0.001", "kore")]
    assert updates == ["20 |", "10 |"]


def test_rates_are_those_after_which_right_answers_are_likeliest(script):
    runs = {str(rate): run("lora", rate, 0, -abs(rate - 0.01), 0.1, [1.0]) for rate in (0.001, 0.01, 0.1)}
    assert "facts: --learning-rate lora=0.01" in script("adapter_tables").report(SETTINGS | {"split": "dev"}, runs)


def test_files_of_other_settings_are_not_mixed(script, tmp_path):
    for name, steps in (("a", 20), ("b", 20), ("c", 21)):
        done = {"settings": SETTINGS | {"steps": steps}, "runs": {name: {}}}
        (tmp_path / name).write_text(json.dumps(done))
    assert set(script("adapter_tables").read_runs([tmp_path / "a", tmp_path / "b"])[1]) == {"a", "b"}
    with pytest.raises(SystemExit, match="other settings"):
        script("adapter_tables").read_runs([tmp_path / "a", tmp_path / "c"])
