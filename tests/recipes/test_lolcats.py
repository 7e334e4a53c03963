"""What the recipe promises about its own stages."""

import pytest
import torch

from kit.convert.errors import KitError
from kit.convert.recipe import ModelFacts
from kit.recipes import load_recipes
from kit.recipes.lolcats import _balance

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "vocab_size": 64,
}


def facts(**change):
    shapes = {}
    for index in range(2):
        for name, shape in {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}.items():
            shapes[f"model.layers.{index}.self_attn.{name}_proj.weight"] = shape
    return ModelFacts(CONFIG | change, shapes)


@pytest.mark.parametrize("maps", ["kv", "query"])
def test_balanced_branches_have_the_masses_of_softmax(maps):
    """By hand, query by query in float64: the mean log ratio of (past : window) in hybrid and softmax is the same."""
    from kit.modules.linear_attention import HybridLinearAttention

    torch.manual_seed(0)
    heads, kv_heads, dim, length, window = 4, 2, 8, 40, 6

    class Attention:
        scaling = dim**-0.5
        linear_attention = HybridLinearAttention(
            num_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            window_size=window,
            feature_dim=5,
            feature_map_heads=maps,
        ).requires_grad_(False)

    hybrid = Attention.linear_attention
    torch.nn.init.normal_(hybrid.feature_map_q)
    torch.nn.init.normal_(hybrid.feature_map_k)
    q, k = torch.randn(2, heads, length, dim) * 2, torch.randn(2, kv_heads, length, dim) * 2
    k[:, :, 0] = q.mean((1, 2))[:, None] * 20 + k[:, :, 0] * 3  # something like a sink
    with torch.no_grad():
        _balance(Attention, q, k)
    for head in range(heads):
        differences = []
        for row in range(2):
            keys = k[row, head // 2].double()
            map_k = hybrid.feature_map_k[head // (heads // len(hybrid.feature_map_k))].double()
            for i in range(window, length):
                query = q[row, head, i].double()
                past, inside = keys[: i - window + 1], keys[i - window + 1 : i + 1]

                def phi(x, weight):
                    z = x @ weight
                    return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

                scores = (past @ query).mul(dim**-0.5).logsumexp(0), (inside @ query).mul(dim**-0.5).logsumexp(0)
                linear = (phi(past, map_k) @ phi(query, hybrid.feature_map_q[head].double())).sum().log()
                g = hybrid.window_factor[head].double().sigmoid().log()
                differences.append((scores[0] - scores[1]) - (linear - g - scores[1]))
        clamped = float(hybrid.window_factor[head].sigmoid()) in (pytest.approx(1e-6), pytest.approx(1 - 1e-6))
        assert clamped or float(torch.stack(differences).mean()) == pytest.approx(0, abs=1e-3)


def test_a_papers_constant_can_be_asked_for():
    recipe = load_recipes("lolcats", ["window_factor=0.1"])[0]
    assert recipe.build(ModelFacts(CONFIG, {}))["linear_attention"]["window_factor"] == 0.1


def test_the_plan_says_what_the_cache_will_cost():
    recipe = load_recipes("lolcats", ["feature_dim=8", "window_size=16"])[0]
    cache = next(item.value for item in recipe.plan(facts()) if item.what == "cache")
    state, window = 2 * 16 * 9 * 4, 2 * 2 * 15 * 8 * 2
    assert cache.startswith(f"{2 * (state + window) / 1e6:.2f} MB")
    assert f"{2 * 2 * 2 * 8 * 2 / 1e3:,.1f} kB a token" in cache


def test_new_parameters_are_counted():
    from kit.convert.streaming import build_skeleton

    for maps in ("kv", "query"):
        recipe = load_recipes("lolcats", [f"feature_map_heads={maps}", "feature_dim=6"])[0]
        skeleton = build_skeleton(recipe.build(ModelFacts(CONFIG | {"intermediate_size": 16}, {})))
        real = sum(p.numel() for name, p in skeleton.named_parameters() if "linear_attention" in name)
        assert recipe.new_parameters(facts()) == real


def test_fused_projections_are_refused_by_name():
    model = facts()
    del model.shapes["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(KitError, match=r"layers\.1\.self_attn\.k_proj\.weight' should have shape \(16, 32\)"):
        load_recipes("lolcats")[0].plan(model)
