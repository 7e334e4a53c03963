"""The command as a user runs it: in a process of its own, judged by output and exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch

from kit.recipes import available

KIT = [sys.executable, "-m", "kit.cli"]
SMALL = ["--set", "window_size=8", "--num-samples", "4", "--seq-len", "24", "-b", "2", "--eval-tokens", "0", "-q"]
SHORT = [*SMALL, "--set", "transfer.steps=2", "--set", "lora.steps=2"]


def kit(*arguments, cwd=None, **options):
    return subprocess.run([*KIT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, **options)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(num_hidden_layers=2, num_attention_heads=2, hidden_size=32)


def lines_of(done, code):
    """The three lines of an error: what, where, next; and no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()[-3:]
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  next:  ")
    return lines


def test_help_and_imports_load_neither_torch_nor_transformers():
    code = "import sys, kit, kit.cli; print([m for m in ('torch', 'transformers', 'rich', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert kit("--version").stdout.strip() == version("kit")
    done = kit("--help")
    for command in ("convert", "eval", "report", "chat", "inspect", "recipes"):
        assert command in done.stdout


def test_convert_eval_chat_inspect(model, tmp_path):
    out = tmp_path / "out"
    done = kit("convert", model, "--recipe", "lolcats", "-o", out, *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(out)
    done = kit("eval", out, "--base", model, "--num-tokens", 64, "--ablations", "--json", "-q")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows][:2] == ["base", "out"]
    assert len(rows) == 5
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 60}" for i in range(100)))
    done = kit("eval", out, "--dataset", text, "--seq-len", 32, "-L", 2, "--num-tokens", 0, "--no-speed", "-q")
    assert done.returncode == 0, done.stderr
    assert "text.txt, 64 tokens in windows of 32" in done.stdout
    results = tmp_path / "results.json"
    arguments = ["--base", model, "--dataset", text, "--seq-len", 32, "--num-tokens", 0, "--no-speed", "--json", "-q"]
    results.write_text(kit("eval", out, *arguments).stdout)
    done = kit("report", out, "--results", results, "--card")
    assert done.returncode == 0, done.stderr
    assert "Perplexity on" in (out / "report.html").read_text()
    assert "model-index" in (out / "README.md").read_text()
    done = kit("chat", out, "--prompt", "w5 w6 w7", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()
    done = kit("chat", out, "--max-new-tokens", 3, input="w5\nw6\nexit\n")
    assert done.returncode == 0, done.stderr
    facts = json.loads(kit("inspect", out, "--json").stdout)
    assert facts["model_type"] == "kit_llama"
    assert facts["cache_bytes"] == {"per_token": 0, "constant": 2 * (2 * 16 * 2 * (7 + 4) + 32 * 17 * 4)}
    assert facts["parameters_by_part"]["linear attention"] == 2 * (3 * 16 * 16 + 2)
    facts = json.loads(kit("inspect", model, "--json").stdout)
    assert facts["recipes"] == dict.fromkeys(available())
    assert facts["cache_bytes"] == {"per_token": 2 * 2 * 16 * 2, "constant": 0}
    assert sum(facts["parameters_by_part"].values()) == facts["parameters"]


def test_inspect_measures_on_text_only_when_asked(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i * i % 60}" for i in range(400)))
    options = ["inspect", model, "--dataset", text, "--num-samples", 2, "--seq-len", 150]
    done = kit(*options, "--stats", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["stats"]["settings"]["num_tokens"] == 300
    assert [layer["index"] for layer in facts["stats"]["layers"]] == [0, 1]
    scores = [each["score"] for each in facts["recommendation"]]
    assert scores == sorted(scores, reverse=True)
    assert {"fireq", "lolcats"} <= {each["recipe"] for each in facts["recommendation"]} <= set(available())
    assert (
        kit("inspect", model, "--json").stdout
        == json.dumps({name: fact for name, fact in facts.items() if name not in ("stats", "recommendation")}, indent=1)
        + "\n"
    )
    done = kit(*options, "--stats", "-q")
    assert done.returncode == 0, done.stderr
    best = facts["recommendation"][0]
    assert done.stdout.index("query heads") < done.stdout.index(f"1. {best['recipe']} {best['score']:.2f}: ")
    assert done.stdout.rstrip().endswith(facts["recommendation"][-1]["command"])
    assert "--stats" in lines_of(kit(*options), 2)[0]


def test_dry_run_writes_nothing(model, tmp_path):
    done = kit("convert", model, "-r", "lolcats", "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 attention layers" in done.stdout
    assert not list(tmp_path.iterdir())
    done = kit("convert", model, "-r", "lolcats", "-o", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(done.stdout)["plan"]["recipe"] == "lolcats"


def test_recipes_ls_show_cp_and_edit(model, tmp_path):
    assert "lolcats-demo" in kit("recipes", "ls").stdout
    assert "lora.rank" in kit("recipes", "show", "lolcats").stdout
    mine = tmp_path / "mine.yaml"
    assert kit("recipes", "cp", "lolcats", mine).returncode == 0
    lines_of(kit("recipes", "cp", "lolcats", mine), 2)
    mine.write_text(mine.read_text().replace("window_size: 64", "window_size: 16"))
    done = kit("convert", model, "-r", mine, "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "what", "next_step"),
    [
        (["convert", "MODEL", "-r", "lolcat", "-o", "o"], 2, "no recipe or file 'lolcat'", "did you mean 'lolcats'"),
        (["convert", "MODEL", "-r", "lolcats", "-o", "o", "--set", "sede=1"], 2, "sede", "did you mean 'seed'"),
        (["convert", "MODEL", "-r", "lolcats", "-o", "o", "--max-shard-size", "5 lots"], 2, "not a size", "5GB"),
        (["convert", "MODEL", "-r", "lolcats", "-o", "MODEL"], 2, "exists already", "--overwrite"),
        (["convert", "./nothing", "-r", "lolcats", "-o", "o"], 1, "nothing", ""),
        (["convert", "MODEL", "-r", "lolcats", "-o", "o", "--dtype", "int3"], 2, "int3", "bfloat16"),
        (["convert", "MODEL", "-r", "lolcats", "-o", "o", "--dataset", "no.jsonl", *SHORT], 1, "no.jsonl", ""),
        (["convert", "MODEL", "-r", "lolcats", "-o", "o", "--device", "cuda:0"], 2, "cuda:0", "--device cpu"),
        (["eval", "MODEL", "--dtype", "int3", "--num-tokens", "0"], 2, "int3", "bfloat16"),
        (["chat", "MODEL", "--dtype", "int3", "--prompt", "w5"], 2, "int3", "bfloat16"),
        (["eval", "./nothing"], 1, "nothing", ""),
        (["eval", "MODEL", "--dataset", "no.txt"], 1, "no.txt", ""),
        (["report", "./nothing"], 2, "no such folder", "kit convert"),
        (["report", "MODEL"], 2, "no report of a conversion", "kit convert"),
        (["recipes", "show", "lolcat"], 2, "lolcat", "did you mean 'lolcats'"),
        (["inspect", "."], 1, "config.json", ""),
        (["inspect", "MODEL", "--stats", "--dataset", "no.jsonl"], 1, "no.jsonl", ""),
        (["inspect", "MODEL", "--stats", "--dataset", "no.jsonl", "--dtype", "int3"], 2, "int3", "bfloat16"),
    ],
)
def test_mistakes_give_three_lines_and_the_right_exit_code(model, tmp_path, arguments, code, what, next_step):
    if "cuda:0" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = kit(*(str(model) if a == "MODEL" else a for a in arguments), cwd=tmp_path)
    lines = lines_of(done, code)
    assert what in lines[0] + lines[1]
    assert next_step in lines[2]
    assert not (tmp_path / "o").exists()


def test_unknown_options_are_usage_errors():
    assert kit("convert", "--nonsense").returncode == 2
    assert kit("nonsense").returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    done = kit("--debug", "inspect", ".", cwd=tmp_path)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_it_says_how_to_go_on_and_goes_on(model, tmp_path, sign):
    out = tmp_path / "out"
    long = ["convert", str(model), "-r", "lolcats", "-o", str(out), *SMALL, "--set", "lora.steps=1"]
    long += ["--set", "transfer.steps=150"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*KIT, *long], stderr=subprocess.PIPE, text=True, env=environment)
    work = tmp_path / ".out.kit-work"
    deadline = time.monotonic() + 120
    while not list(work.glob("*layer-0000.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sign)
    _, err = process.communicate()
    assert not out.exists()
    if sign != signal.SIGKILL:
        assert process.returncode == 130, err
        assert err.strip().splitlines()[-1].startswith("  next:  kit convert")
        assert "--resume" in err
    lines_of(kit(*long), 2)  # neither --resume nor --overwrite: refused, nothing lost
    changed = kit(*long, "--resume", "--seed", "5")
    assert "recipes changed" in lines_of(changed, 2)[0]
    done = kit(*long, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "config.json").exists()
    assert not work.exists()
