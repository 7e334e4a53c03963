"""Every preset loads, and names, keys and values that are wrong are explained. Also run as a pre-commit check."""

import sys

import pytest
import yaml

from kit.convert.errors import ExitCode, KitError
from kit.convert.recipe import Recipe
from kit.recipes import available, describe, load_recipes, presets


def test_every_preset_loads_and_opens_with_what_command_and_override():
    for name, preset in presets().items():
        assert load_recipes(name)[0].name == preset.recipe
        lines = preset.text.splitlines()
        assert lines[0].startswith("# ")
        command = available()[preset.recipe].command
        assert lines[1].startswith(f"# Run:      kit {command} ")
        assert lines[2].startswith(f"# Override: kit {command} ")


def test_every_recipe_has_a_preset_of_its_name_a_summary_and_described_options():
    for name, cls in available().items():
        assert presets()[name].recipe == name
        assert (cls.__doc__ or "").strip()
        assert all(text for _, _, _, text in describe(name))


def test_stages_run_in_the_order_in_which_they_are_written():
    stages = ["layer_sensitivity", "attention_transfer", "logit_distillation", "low_rank_linearizing"]
    assert [stage.method for stage in available()["lolcats"].stages()] == stages


def test_overrides_reach_nested_options():
    recipe = load_recipes("lolcats", ["lora.rank=4", "data.dataset=self", "window-size=32"])[0]
    assert (recipe.config.lora.rank, recipe.config.window_size) == (4, 32)


def test_a_file_may_hold_several_recipes(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text(yaml.safe_dump({"recipes": [{"recipe": "lolcats"}, {"recipe": "lolcats", "seed": 4}]}))
    recipes = load_recipes(str(file), ["1.window_size=16"])
    assert [r.config.seed for r in recipes] == [0, 4]
    assert [r.config.window_size for r in recipes] == [64, 16]


@pytest.mark.parametrize(
    ("name", "overrides", "where", "hint"),
    [
        ("lolcat", [], "--recipe", "did you mean 'lolcats'?"),
        ("lolcats", ["lora.rnk=4"], "recipe lolcats: lora.rnk", "did you mean 'rank'?"),
        ("lolcats", ["windw_size=4"], "recipe lolcats: windw_size", "did you mean 'window_size'?"),
        ("lolcats", ["window_size=0"], "recipe lolcats: window_size", "kit recipes show lolcats"),
        ("lolcats", ["window_size"], "--set", "write key=value"),
        ("lolcats", ["seed.x=1"], "--set seed.x=1", "check the dots"),
    ],
)
def test_mistakes_name_the_place_and_the_next_step(name, overrides, where, hint):
    with pytest.raises(KitError) as caught:
        load_recipes(name, overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.where == where
    assert hint in caught.value.next_step


@pytest.mark.parametrize("text", ["a: [", "just text", "recipe: nothing", "window_size: 3"])
def test_files_that_are_no_recipe(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(KitError) as caught:
        load_recipes(str(file))
    assert str(file) in caught.value.where


def test_listing_recipes_is_light():
    import subprocess

    code = "import sys, kit.recipes as r; r.available(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert issubclass(available()["lolcats"], Recipe)


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "--import-mode=importlib", __file__]))
