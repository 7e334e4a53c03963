"""Intervals against scipy and an enumeration, fronts against a loop, and the command on tiny models."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from kit.convert.checkpoint import Checkpoint, open_checkpoint
from kit.convert.compare import compare, compare_rows, paired_bootstrap, read_result
from kit.convert.errors import KitError
from kit.convert.evaluate import evaluate
from kit.convert.pareto import label_points, pareto_front, plot_pareto

KIT = [sys.executable, "-m", "kit.cli"]


@pytest.mark.parametrize("transform", [None, np.exp])
def test_the_interval_is_scipy_s(transform):
    draw = np.random.default_rng(0)
    hard = draw.normal(2.5, 0.6, 40)
    a, b = hard + draw.normal(0.05, 0.1, 40), hard + draw.normal(0, 0.1, 40)
    apply = transform or (lambda x: x)
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: apply(x.mean(axis)) - apply(y.mean(axis)),
        paired=True,
        vectorized=True,
        n_resamples=50_000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    difference, low, high = paired_bootstrap(a, b, transform)
    assert difference == pytest.approx(apply(a.mean()) - apply(b.mean()))
    width = high - low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_of_three_samples_the_interval_is_that_of_all_27_resamples():
    a, b = [1.0, 5.0, 2.0], [0.5, 1.0, 3.0]
    exact = [np.mean([a[i] - b[i] for i in places]) for places in itertools.product(range(3), repeat=3)]
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert paired_bootstrap(a, b) == pytest.approx((np.mean(a) - np.mean(b), low, high))


def test_equal_models_are_called_different_in_about_one_of_twenty_comparisons():
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        _, low, high = paired_bootstrap(draw.normal(0, 1, 40), draw.normal(0, 1, 40), resamples=1000)
        wrong += low > 0 or high < 0
    assert 0.02 < wrong / 300 < 0.10


def row(name, losses=None, correct=None, **more):
    found = {"name": name, **more}
    if losses is not None:
        found |= {"window_losses": losses, "perplexity": float(np.exp(np.mean(losses)))}
    if correct is not None:
        found["tasks"] = {"arc_easy": {"metrics": {"acc": float(np.mean(correct))}, "correct": correct}}
    return found


def test_rows_are_compared_with_the_base_and_with_the_first_model():
    losses = np.linspace(2, 3, 12)
    rows = [
        row("base", list(losses), [1] * 20),
        row("a", list(losses + 0.1), [1] * 10 + [0] * 10),
        row("b", list(losses + 0.1), [0] * 10 + [1] * 9),  # one answer is missing
    ]
    found = {(c["metric"], c["a"], c["b"]): c for c in compare_rows(rows)}
    assert set(found) == {
        ("perplexity", "a", "base"),
        ("perplexity", "b", "base"),
        ("perplexity", "b", "a"),
        ("arc_easy", "a", "base"),
    }
    assert found["perplexity", "a", "base"]["significant"]
    assert found["perplexity", "a", "base"]["difference"] == pytest.approx(np.exp(2.6) - np.exp(2.5))
    assert found["perplexity", "b", "a"]["low"] == found["perplexity", "b", "a"]["high"] == 0
    assert not found["perplexity", "b", "a"]["significant"]
    assert found["arc_easy", "a", "base"]["difference"] == -0.5
    assert found["arc_easy", "a", "base"]["significant"]
    assert found["arc_easy", "a", "base"]["samples"] == 20


def test_few_samples_are_never_significant():
    rows = [row("a", [2.0] * 5), row("b", [3.0] * 5)]
    assert [(c["low"] > 0, c["significant"]) for c in compare_rows(rows)] == [(True, False)]
    rows = [row("a", [2.0] * 6), row("b", [3.0] * 6)]
    assert [c["significant"] for c in compare_rows(rows)] == [True]


def test_the_front_is_what_no_point_beats():
    costs = np.random.default_rng(0).integers(0, 6, (60, 2)).astype(float)
    want = [not any((other <= point).all() and (other < point).any() for other in costs) for point in costs]
    assert pareto_front(costs).tolist() == want
    assert 0 < sum(want) < 60


def test_labels_cover_neither_each_other_nor_points_nor_the_edge():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = np.random.default_rng(1).normal([1, 20], 0.01, (12, 2))
    points[0] = [2, 30]
    axes.scatter(*points.T)
    canvas.draw()
    texts = label_points(axes, canvas.get_renderer(), points, [f"model-{i}-int4" for i in range(12)])
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert axes.bbox.x0 < box.x0 < box.x1 < axes.bbox.x1
        assert not any(box.contains(*point) for point in axes.transData.transform(points))


def test_plots_without_anything_to_plot_are_refused(tmp_path):
    plot_pareto([row("a", [2.0], bytes=2**20), row("a, ablation", [3.0])], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(KitError, match="nothing to plot"):
        plot_pareto([{"name": "a", "bytes": 5}], tmp_path / "none.png")


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    """A base, two models and a text of 8 windows."""
    folder = tmp_path_factory.mktemp("compare")
    for seed, name in enumerate(("base-model", "one", "two")):
        make_model(seed=seed).rename(folder / name)
    (folder / "text.txt").write_text(" ".join(f"w{4 + i * i % 89}" for i in range(256)))
    return folder


@pytest.fixture(scope="module")
def measure(folder):
    def run(function, *names, base="base-model", **change):
        models = {name: open_checkpoint(str(folder / name)) for name in names if isinstance(name, str)}
        models |= {f"{i}.json": result for i, result in enumerate(names) if isinstance(result, dict)}
        options = {"num_tokens": 64, "dataset": str(folder / "text.txt"), "seq_len": 32, "speed": False} | change
        return function(models, base=open_checkpoint(str(folder / base)) if base else None, **options)

    return run


def quality(result):
    return [(r["name"], r["perplexity"], r.get("kl")) for r in result["rows"]]


def test_earlier_results_stand_beside_new_ones_as_if_measured_together(measure, monkeypatch):
    together = measure(compare, "one", "two")
    assert [r["name"] for r in together["rows"]] == ["base", "one", "two"]
    earlier = json.loads(json.dumps(measure(evaluate, "one")))
    mixed = measure(compare, "two", earlier)
    assert sorted(quality(mixed)) == sorted(quality(together))
    assert [r["name"] for r in mixed["rows"]] == ["base", "two", "one"]
    monkeypatch.setattr(Checkpoint, "load_model", None)  # from here on nothing is measured
    read = measure(compare, earlier, mixed)
    assert [r["name"] for r in read["rows"]] == ["base", "one", "two", "1.json: one"]
    assert read["settings"] == mixed["settings"]
    assert read["comparisons"][0]["samples"] == 8
    with pytest.raises(KitError, match="base is"):
        measure(compare, earlier, base="two")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seq_len": 16}, "window is 32, not 16"),
        ({"max_windows": 4}, "dataset_tokens is 256, not 128"),
        ({"dtype": "bfloat16"}, "dtype is 'auto', not 'bfloat16'"),
        ({"base": None}, "base is '.*base-model', not None"),
        ({"dataset": None}, "dataset is 'text.txt', not None"),
        ({"generations": 1}, "generations is None, not"),
    ],
)
def test_results_measured_otherwise_are_refused_before_weights_load(measure, monkeypatch, change, what):
    earlier = measure(evaluate, "one")
    monkeypatch.setattr(Checkpoint, "load_model", None)
    with pytest.raises(KitError, match=what) as caught:
        measure(compare, "two", earlier, **change)
    assert "measure both with the same --" in caught.value.next_step
    assert caught.value.exit_code == 2


def test_another_text_of_the_same_name_and_length_is_refused(measure, folder, tmp_path):
    earlier = measure(evaluate, "one")
    other = tmp_path / "text.txt"
    other.write_text((folder / "text.txt").read_text().replace("w5 ", "w6 "))
    with pytest.raises(KitError, match="dataset_sha256"):
        measure(compare, "two", earlier, dataset=str(other))


def test_what_is_no_result_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"rows": [], "settings": {}}', '{"rows": [{"name": "a"}]}'):
        path.write_text(text)
        with pytest.raises(KitError) as caught:
            read_result(path)
        assert "kit eval" in caught.value.next_step
    with pytest.raises(KitError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_the_command(folder, tmp_path):
    def kit(*arguments):
        return subprocess.run([*KIT, *map(str, arguments)], capture_output=True, text=True, cwd=folder)

    options = ["--base", "base-model", "--dataset", "text.txt", "--seq-len", 32, "--num-tokens", 64, "-q"]
    done = kit("eval", "one", *options, "--json")
    assert done.returncode == 0, done.stderr
    (tmp_path / "one.json").write_text(done.stdout)
    out = tmp_path / "results"
    done = kit("compare", tmp_path / "one.json", "two", *options, "-o", out, "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    assert "two - one" in done.stdout
    assert "95 % interval" in done.stdout
    assert "MiB" in done.stdout
    assert (out / "pareto.png").read_bytes() == (tmp_path / "plot.png").read_bytes()
    written = json.loads((out / "compare.json").read_text())
    assert [r["name"] for r in written["rows"]] == ["base", "one", "two"]
    again = kit("compare", out / "compare.json", "--json", "-q")
    assert json.loads(again.stdout) == written
    for place in (["-o", out], ["--plot", tmp_path / "plot.png"]):
        done = kit("compare", tmp_path / "one.json", "nowhere", *place)  # refused before models are looked for
        assert done.returncode == 2
        assert "results of an earlier run are there" in done.stderr
        assert "--overwrite" in done.stderr
    done = kit("compare", out / "compare.json", "-o", out, "--plot", tmp_path / "plot.png", "--overwrite", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "compare.json").read_text()) == written
    for wrong, what in ((["--plot", "plot.pdf"], "PNG"), (["-o", "text.txt"], "file of that name")):
        done = kit("compare", "one", *wrong)
        assert done.returncode == 2
        assert what in done.stderr
    done = kit("eval", "one", "--recall", "512;1024")
    assert done.returncode == 2
    assert "'512;1024' are no lengths" in done.stderr
