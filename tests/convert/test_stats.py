"""Statistics against float64 figures from transformers' own eager attention, hidden states and linears' inputs."""

import copy
import io
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kit.convert.checkpoint import open_checkpoint
from kit.convert.data import DataConfig, load_rows
from kit.convert.errors import ExitCode, KitError
from kit.convert.inspect import cache_bytes, recommend
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts, Recipe, Suitability
from kit.convert.stats import ERRORS, NUM_SINKS, SITES, WINDOWS, droppable_shares, measure, spectrum, weight_stats
from kit.convert.stats_tables import print_stats, sparkline
from kit.recipes import available, load_recipes

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
FAMILIES = {
    "llama": GQA | {"family": "llama"},
    "mistral, window 100": GQA | {"family": "mistral", "sliding_window": 100},
    "qwen2": GQA | {"family": "qwen2"},
    "qwen3, one layer of window 100": GQA
    | {"family": "qwen3", "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
}


def write_text(folder, lengths=(400, 70, 200, 500, 400), start="", seed=0):
    """Documents of random words, of so many tokens."""
    words = torch.randint(4, 96, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).tolist()
    file = folder / "text.jsonl"
    with file.open("w") as out:
        for length in lengths:
            text = start + " ".join(f"w{words.pop()}" for _ in range(length - len(start.split())))
            out.write(json.dumps({"text": text}) + "\n")
    return DataConfig(dataset=str(file), num_samples=5, seq_len=300)


def opened(folder):
    """The checkpoint, with its tokenizer of words: by model type transformers would take Qwen's own class for it."""
    checkpoint = open_checkpoint(str(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    checkpoint.load_tokenizer = lambda *_: tokenizer
    return checkpoint


def run_eager(folder, data):
    """The same rows through transformers: rows, attention by layer (N, H, T, T), hidden states, linears' inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    rows = load_rows(data, opened(folder).load_tokenizer(), seed=0)
    inputs = {}
    for index, layer in enumerate(model.model.layers):
        for names in SITES.values():
            layer.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, key=(index, names[0]): inputs.__setitem__(key, args[0])
            )
    layers = []  # before the final norm, which transformers' own list of hidden states ends with
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: layers.append(output))
    with torch.no_grad():
        out = model(rows.input_ids, position_ids=rows.position_ids, output_attentions=True, use_cache=False)
    return model, rows, [a.double() for a in out.attentions], layers, inputs


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, make_model, tmp_path_factory):
    folder = make_model(**FAMILIES[request.param])
    data = write_text(tmp_path_factory.mktemp("text"))
    stats = measure(opened(folder), data, dtype="float32")
    return request.param, stats, *run_eager(folder, data)


def mean_over(queries, value):
    """Mean of value(row, query) by head over (row, query) pairs, or None."""
    return np.mean([value(*query) for query in queries], axis=0).tolist() if queries else None


def test_attention_is_that_of_eager_transformers(case):
    name, stats, _, rows, attentions, _, _ = case
    for layer, attention in zip(stats.layers, attentions, strict=True):
        found = layer.attention
        weights, positions = attention.numpy(), rows.position_ids.numpy()
        pairs = [(row, query) for row in range(len(weights)) for query in range(weights.shape[2])]
        count = (weights > 0).any(1).sum(-1)
        several = [pair for pair in pairs if count[pair] > 1]

        def entropy(row, query, weights=weights):
            p = weights[row, :, query]
            return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)

        def share(row, query, keys, weights=weights):
            return weights[row, :, query] @ keys

        assert found.entropy == pytest.approx(mean_over(several, entropy), rel=1e-4)
        relative = mean_over(several, lambda r, q, e=entropy, c=count: e(r, q) / math.log(c[r, q]))
        assert found.relative_entropy == pytest.approx(relative, rel=1e-4)
        for window in found.windows:
            far = [pair for pair in pairs if count[pair] > window.size + NUM_SINKS]
            index = np.arange(weights.shape[-1])
            assert window.queries == len(far)
            for figure, sinks in ((window.mass, 0), (window.mass_with_sinks, NUM_SINKS)):
                expected = mean_over(
                    far,
                    lambda r, q, n=sinks, w=window.size, p=positions, i=index, s=share: s(
                        r, q, ((q - i < w) | (p[r] < n)).astype(float)
                    ),
                )
                assert (figure is None) == (expected is None)
                assert figure is None or figure == pytest.approx(expected, rel=1e-4)
            if window.size == WINDOWS[0]:
                for figure, sinks in ((found.first_token, 1), (found.sinks, NUM_SINKS)):
                    expected = mean_over(far, lambda r, q, n=sinks, p=positions, s=share: s(r, q, (p[r] < n) * 1.0))
                    assert figure == pytest.approx(expected, rel=1e-3, abs=1e-7)
    windowed = {"mistral, window 100": [True, True], "qwen3, one layer of window 100": [False, True]}
    beyond = [layer.attention.windows[1].queries == 0 for layer in stats.layers]
    assert beyond == windowed.get(name, [False, False])  # a query of a window of 100 has no 128 keys to lose
    assert (positions == 0).sum() > len(positions), "no packed documents: the test is too easy"


def test_blocks_of_queries_change_nothing(make_model, tmp_path, monkeypatch):
    checkpoint, data = open_checkpoint(str(make_model(**GQA))), write_text(tmp_path)
    whole = measure(checkpoint, data)
    monkeypatch.setattr("kit.convert.stats.BLOCK_BYTES", 4 * 4 * 300 * 7)  # seven queries
    for one, blocked in zip(whole.layers, measure(checkpoint, data).layers, strict=True):
        one, blocked = asdict(one.attention), asdict(blocked.attention)
        for a, b in zip(one.pop("windows"), blocked.pop("windows"), strict=True):
            assert a == {name: pytest.approx(value, rel=1e-4) for name, value in b.items()}
        assert one == {name: pytest.approx(value, rel=1e-4) for name, value in blocked.items()}


def test_residual_and_inputs_and_weights_are_those_of_float64(case):
    _, stats, model, rows, _, hidden, inputs = case
    assert stats.settings["num_tokens"] == rows.num_tokens == 1500
    for layer, h, module in zip(stats.layers, hidden, model.model.layers, strict=True):
        size = h.abs()
        assert layer.residual.largest == pytest.approx(float(size.max()), rel=1e-4)
        median = float(np.sort(size.numpy().ravel())[(size.numel() - 1) // 2])
        assert layer.residual.ratio == pytest.approx(float(size.max()) / median, rel=1e-4)
        assert layer.residual.massive_tokens == int(((size / median) > 1000).any(-1).sum())
        for channel in layer.residual.channels:
            row, time = (
                (size[..., channel["channel"]] == abs(size[..., channel["channel"]]).max()).nonzero()[0].tolist()
            )
            assert channel["value"] == pytest.approx(float(h[row, time, channel["channel"]]), rel=1e-4)
            assert channel["position"] == rows.position_ids[row, time]
            assert channel["token"] == f"w{rows.input_ids[row, time]}"
        for site, names in SITES.items():
            found, x = layer.inputs[site], inputs[layer.index, names[0]].flatten(0, 1)
            second = (x.T @ x).numpy()
            p = np.linalg.eigvalsh(second)[::-1].clip(0)
            p = p / p.sum()
            assert found.effective_rank == pytest.approx(float(np.exp(-(p * np.log(p + 1e-300)).sum())), rel=1e-3)
            assert found.energy_top_1_percent == pytest.approx(p[0], rel=1e-3)
            assert found.energy_top_10_percent == pytest.approx(p[: round(0.1 * len(p))].sum(), rel=1e-3)
            energy = np.sort(np.diag(second))[::-1]
            assert found.channel_energy_top_1_percent == pytest.approx(energy[0] / energy.sum(), rel=1e-3)
            z = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
            assert found.kurtosis == pytest.approx(float(z.pow(4).mean()), rel=1e-4)
            peak = x.abs().amax(-1) / x.square().mean(-1).sqrt()
            assert found.max_over_rms == pytest.approx(float(peak.mean()), rel=1e-4)
            assert found.largest_max_over_rms == pytest.approx(float(peak.max()), rel=1e-4)
            scale = x.abs().amax(-1, keepdim=True) / 448
            rounded = (x / scale).to(torch.float8_e4m3fn).double() * scale
            assert found.fp8_error == pytest.approx(
                float(((x - rounded).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=0.01
            )
            sample = x[:: len(x) // 256][:256]
            weights = torch.cat([module.get_submodule(name).weight.detach() for name in names]).double()
            scores = [(found.droppable, sample.abs())]
            assert (found.cett is None) == (site != "down")
            if site == "down":
                scores.append((found.cett, sample.abs() * weights.norm(dim=0)))
            for shares, score in scores:
                share = shares["0.2"]
                assert 0.99 * within(sample, weights, score, share) <= 0.2
                assert 1.01 * within(sample, weights, score, share + 1 / 128) > 0.2
            for name in names:
                weight = module.get_submodule(name).weight.detach().double()
                delta = rtn(weight) - weight
                assert layer.weights[name].int4_error == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-3)
                error = float((x @ delta.T).norm() / (x @ weight.T).norm())
                assert layer.weights[name].int4_output_error == pytest.approx(error, rel=1e-3)


def rtn(weight):
    """Round to nearest, symmetric, whole rows or groups of 64: levels -8 ... 7 of max|w| / 7.5, a bf16 scale."""
    size = 64 if weight.shape[1] % 64 == 0 else weight.shape[1]
    out = torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size]
            scale = float((group.float().abs().max() / 7.5).bfloat16())
            out[row, start : start + size] = torch.tensor(
                [min(max(round(w / scale), -8), 7) * scale for w in group.tolist()]
            )
    return out


def within(x, weight, score, share):
    """Mean relative output error without that share of the entries, smallest score first, in float64."""
    x, weight = x.double(), weight.double()
    threshold = np.sort(score.numpy().ravel())[int(share * score.numel())]
    dropped = x * torch.from_numpy(score.numpy() < threshold)
    return float(((dropped @ weight.T).norm(dim=1) / (x @ weight.T).norm(dim=1)).mean())


def test_sparsity_is_the_largest_share_within_the_error_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 40, generator=generator) ** 3  # heavy tails: much can go
    weight = torch.randn(30, 40, generator=generator) * torch.rand(40, generator=generator)
    for score in (x.abs(), x.abs() * weight.norm(dim=0)):
        for limit, share in droppable_shares(x, weight, score).items():
            assert within(x, weight, score, share) <= float(limit) < within(x, weight, score, share + 1 / 128)
            assert share > 0.1 or limit != "0.2"
    plain, weighted = (droppable_shares(x, weight, score)["0.2"] for score in (x.abs(), x.abs() * weight.norm(dim=0)))
    assert weighted > plain  # contributions are the better order when columns differ in size
    assert droppable_shares(torch.zeros(4, 40), weight, torch.zeros(4, 40)) == dict.fromkeys(
        map(str, ERRORS), 127 / 128
    )


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    assert spectrum(basis[:, :5] @ basis[:, :5].T)[0] == pytest.approx(5, rel=1e-3)
    rank, top_1, top_10 = spectrum(torch.eye(20))
    assert (rank, top_1, top_10) == pytest.approx((20, 1 / 20, 2 / 20))


def test_int4_error_of_a_weight_on_the_grid_is_none():
    weight = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 7.5
    weight = torch.cat([weight, weight], 1)
    weight[:, ::64] = -7.5  # largest magnitude of each group: scale 1, itself a tie between -7 and -8
    found = weight_stats(weight[:, 1:64].repeat(1, 1), torch.eye(63))
    assert found.group_size == 63
    assert weight_stats(weight, torch.eye(128)).int4_error == pytest.approx(
        float(0.5 * (4 * 2) ** 0.5 / weight.norm()), rel=1e-5
    )


@pytest.fixture(scope="module")
def planted(make_model, tmp_path_factory):
    """<s> is massive in channel 11, and every query of every head looks at it; the other tokens are ordinary."""
    folder = make_model(**GQA, attention_bias=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][1, 11] = 20000.0
    for index in range(2):
        attention = f"model.layers.{index}.self_attn."
        slow = torch.zeros(16)
        slow[7] = 1.0  # the pair of channels that RoPE turns least
        query, key = tensors[attention + "q_proj.bias"], tensors[attention + "k_proj.weight"]
        query.copy_((50 * slow).repeat(4))
        key[:, 11] = (2 * slow).repeat(2)
    save_file(tensors, file, metadata={"format": "pt"})
    data = write_text(tmp_path_factory.mktemp("text"), lengths=(299, 299, 299), start="<s> ")
    return folder, data, measure(open_checkpoint(str(folder)), data)


def test_a_massive_channel_and_a_sink_are_found(planted):
    _, _, stats = planted
    assert stats.settings["num_documents"] == 3
    for layer in stats.layers:
        found = layer.residual.channels[0]
        assert (found["channel"], found["position"], found["token"]) == (11, 0, "<s>")
        assert found["ratio"] == layer.residual.ratio > 1000
        assert layer.residual.channels[1]["ratio"] < 1000
        assert (layer.residual.massive_tokens, layer.residual.massive_starts) == (3, 3)
        assert min(layer.attention.first_token) > 0.99
        assert max(layer.attention.entropy) < 0.1
        for window in layer.attention.windows:
            assert max(window.mass or [0]) < 0.01
            assert min(window.mass_with_sinks or [1]) > 0.99
    assert stats.layers[0].inputs["qkv"].largest_max_over_rms == pytest.approx(48**0.5, rel=1e-3)  # one channel is all
    assert stats.window_mass(64, sinks=True) == pytest.approx([1, 1], abs=0.01)
    assert stats.window_mass(256, sinks=False) == pytest.approx([0, 0], abs=0.01)


def test_bf16_gives_the_same_picture(make_model, tmp_path):
    folder, data = make_model(**GQA, dtype=torch.bfloat16), write_text(tmp_path)
    half, full = (measure(open_checkpoint(str(folder)), data, dtype=dtype) for dtype in ("auto", "float32"))
    assert half.settings["dtype"] == "bfloat16"
    for a, b in zip(half.layers, full.layers, strict=True):
        assert a.residual.ratio == pytest.approx(b.residual.ratio, rel=0.05)
        assert a.attention.relative_entropy == pytest.approx(b.attention.relative_entropy, rel=0.02)
        assert a.attention.windows[0].mass == pytest.approx(b.attention.windows[0].mass, rel=0.05)
        for site in SITES:
            assert a.inputs[site].effective_rank == pytest.approx(b.inputs[site].effective_rank, rel=0.02)
            assert a.inputs[site].droppable["0.2"] == pytest.approx(b.inputs[site].droppable["0.2"], abs=0.05)


def test_a_linearized_model_has_no_softmax_attention_to_look_at(make_model, tmp_path):
    options = ["transfer.steps=0", "lora.steps=0", "data.num_samples=2", "data.seq_len=80"]
    target = Options(output=tmp_path / "out", device="cpu", eval_tokens=0)
    convert(open_checkpoint(str(make_model(**GQA))), load_recipes("lolcats", options), target, Progress())
    checkpoint = open_checkpoint(str(target.output))
    stats = measure(checkpoint, write_text(tmp_path))
    json.dumps(stats.to_dict(), allow_nan=False)
    for layer in stats.layers:
        assert layer.attention is None
        assert layer.inputs["down"].cett["0.2"] > 0
    assert stats.window_mass(64, True) is None
    assert ranked(checkpoint, stats) == {}


# ---- recommendation


def recipes():
    return [cls(cls.config_class(recipe=name)) for name, cls in available().items()]


@pytest.fixture(scope="module")
def measured(make_model, tmp_path_factory):
    folder = make_model(**GQA, max_position_embeddings=2048)
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, measure(checkpoint, write_text(tmp_path_factory.mktemp("text")))


def changed(stats, *, masses=None, int4=None):
    """The statistics with other attention masses (by window, sinks included) or another INT4 error."""
    stats = copy.deepcopy(stats)
    for layer in stats.layers:
        for window in layer.attention.windows:
            if masses:
                window.queries, window.mass_with_sinks = 10, [masses[window.size]] * 4
                window.mass = [masses[window.size] / 2] * 4
        for weight in layer.weights.values():
            weight.int4_output_error = weight.int4_output_error if int4 is None else int4
    return stats


def ranked(checkpoint, stats):
    return {each["recipe"]: each for each in recommend(checkpoint, recipes(), stats)}


def test_the_ranking_follows_the_figures(measured):
    checkpoint, stats = measured
    local = changed(stats, masses={64: 0.95, 128: 0.97, 256: 0.99}, int4=0.3)
    others = lambda stats: [name for name in ranked(checkpoint, stats) if name in ("lolcats", "fireq")]  # noqa: E731
    assert others(local) == ["lolcats", "fireq"]
    exact = changed(stats, masses={64: 0.95, 128: 0.97, 256: 0.99}, int4=0.01)
    assert others(exact) == ["fireq", "lolcats"]
    assert ranked(checkpoint, local)["lolcats"]["score"] == pytest.approx(0.95)
    assert "--set" not in ranked(checkpoint, local)["lolcats"]["command"]


def test_lolcats_asks_for_a_window_that_keeps_enough(measured):
    checkpoint, stats = measured
    found = ranked(checkpoint, changed(stats, masses={64: 0.5, 128: 0.92, 256: 0.99}))["lolcats"]
    assert found["command"] == f"kit convert {checkpoint.source} -r lolcats --set window_size=128 -o OUT"
    assert found["score"] == pytest.approx(0.92)
    assert "92% of the attention lies within 128 tokens" in found["reason"]
    assert "46% within 128 alone" in found["reason"]
    config = available()["lolcats"].config_class(window_size=128)
    cache = cache_bytes(available()["lolcats"](config).build(ModelFacts.of(checkpoint)))["constant"]
    assert (
        f"beyond {cache / (2 * 2 * 2 * 16 * 2):,.0f} tokens" in found["reason"]
    )  # two layers, k and v, two heads of 16
    far = ranked(checkpoint, changed(stats, masses={64: 0.1, 128: 0.2, 256: 0.3}))["lolcats"]
    assert (far["score"], "window_size=256" in far["command"]) == (pytest.approx(0.3), True)


def test_lolcats_does_not_apply_where_every_layer_has_a_window(make_model, tmp_path):
    checkpoint = open_checkpoint(str(make_model(**FAMILIES["mistral, window 100"])))
    stats = measure(checkpoint, write_text(tmp_path))
    assert stats.window_mass(64, sinks=True)
    assert set(ranked(checkpoint, stats)) == {"fireq", "teal", "wina", "chess"}


def test_sparse_recipes_are_judged_by_what_can_be_dropped(measured):
    """Everything droppable at an error of 0.01, and then only a quarter of it at 0.2."""
    checkpoint, stats = measured

    def with_shares(shares):
        found = copy.deepcopy(stats)
        for layer in found.layers:
            for measured_input in layer.inputs.values():
                measured_input.droppable, measured_input.cett = dict(shares), None
        return ranked(checkpoint, found)

    easy = with_shares({"0.01": 0.9, "0.1": 0.95, "0.2": 0.99})
    assert easy["teal"]["score"] == pytest.approx(1 - 0.01 * 0.5 / 0.9)
    assert easy["chess"]["score"] > easy["teal"]["score"]  # k, v and the gate stay dense
    assert "--set" not in easy["teal"]["command"]
    hard = with_shares({"0.01": 0.05, "0.1": 0.1, "0.2": 0.25})
    assert hard["teal"]["score"] == pytest.approx(1 - (0.2 + 0.8 * 0.25 / 0.75))
    assert "--set sparsity=0.25" in hard["teal"]["command"]


def test_fireq_names_the_linears_that_stand_out(measured):
    checkpoint, stats = measured
    even = changed(stats, int4=0.1)
    found = ranked(checkpoint, even)["fireq"]
    errors = [math.hypot(0.1, layer.input_of(name).fp8_error) for layer in even.layers for name in layer.weights]
    assert found["score"] == pytest.approx(1 - np.mean(errors))
    assert "--set" not in found["command"]
    even.layers[1].weights["mlp.down_proj"].int4_output_error = 0.9
    found = ranked(checkpoint, even)["fireq"]
    assert "layers.1.mlp.down_proj" in found["reason"]
    assert "bits_budget" in found["command"]
    options = found["command"].split("--set ")[1].split()[0]
    load_recipes("fireq", [options])  # the advice is accepted


def test_text_that_never_leaves_a_window_recommends_no_window(make_model, tmp_path):
    checkpoint = open_checkpoint(str(make_model(**GQA)))
    stats = measure(checkpoint, write_text(tmp_path).model_copy(update={"seq_len": 60}))
    assert stats.layers[0].attention.sinks is None
    assert stats.layers[0].attention.windows[0].mass is None
    assert "lolcats" not in ranked(checkpoint, stats)


def test_a_recipe_brings_its_own_judgement(measured):
    checkpoint, stats = measured

    class Sparse(Recipe):
        name = "sparse"
        config_class = available()["lolcats"].config_class

        def suits(self, stats, model):
            return Suitability(2.0, f"{len(stats.layers)} layers", ("a=1", "b=2"))

    class Refuses(Sparse):
        name = "refuses"
        families = ("mamba",)

    class Silent(Recipe):
        name = "silent"
        config_class = available()["lolcats"].config_class

    extra = [cls(cls.config_class()) for cls in (Sparse, Refuses, Silent)]
    found = recommend(checkpoint, [*recipes(), *extra], stats)
    assert found[0] == {
        "recipe": "sparse",
        "score": 2.0,
        "reason": "2 layers",
        "command": f"kit convert {checkpoint.source} -r sparse --set a=1 --set b=2 -o OUT",
    }
    judges = {name for name, recipe in available().items() if recipe.suits is not Recipe.suits} - {"r-sparse"}
    assert {each["recipe"] for each in found} == {"sparse", *judges}


# ---- mistakes and tables


@pytest.mark.parametrize(
    ("change", "options", "what", "code"),
    [
        ({"model_type": "qwen9"}, {}, "'qwen9' are not known", ExitCode.FAILED),
        ({"quantization_config": {}}, {}, "already quantized", ExitCode.FAILED),
        ({}, {"dtype": "int3"}, "int3", ExitCode.USAGE),
        ({}, {"data": DataConfig(dataset="no.jsonl")}, "cannot be read", ExitCode.FAILED),
    ],
)
def test_mistakes_are_found_before_weights_are_read(make_model, tmp_path, monkeypatch, change, options, what, code):
    checkpoint = open_checkpoint(str(make_model()))
    checkpoint.config.update(change)
    monkeypatch.setattr(type(checkpoint), "read", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(KitError, match=what) as error:
        measure(checkpoint, **{"data": write_text(tmp_path), **options})
    assert error.value.exit_code == code


def test_a_model_of_nan_is_refused(make_model, tmp_path):
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KitError, match="NaN or infinite") as error:
        measure(open_checkpoint(str(folder)), write_text(tmp_path))
    assert "layer 1: input of mlp.down_proj" in error.value.where


def test_tables_show_every_layer_and_end_with_the_recommendation(planted):
    folder, _, stats = planted
    console = Console(width=140, record=True, file=io.StringIO())
    print_stats(console, stats, recommend(open_checkpoint(str(folder)), recipes(), stats))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    residual = stats.layers[1].residual
    assert any(line.split()[:2] == ["1", f"{residual.largest:,.0f}"] and "11 at 0" in line for line in lines)
    assert f"{stats.layers[1].weights['mlp.down_proj'].int4_output_error:.1%}" in text
    assert text.rindex("kit convert") > text.rindex("Recommendation:") > text.rindex("mean")
    empty = copy.deepcopy(stats)
    for layer in empty.layers:
        layer.attention = None  # as of a linearized model
    print_stats(console, empty, [])
    assert "none: no recipe" in console.export_text()


def test_bars():
    assert sparkline([0, 0.5, 1]) == "▁▅█"
    assert sparkline([1, 0] * 32) == "▅" * 32
