"""Experts as linears of their own compute what transformers' fused ones do."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from kit.modules.experts import Experts, separate_experts

CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=5, num_experts_per_tok=2, intermediate_size=24),
    "qwen3_moe": Qwen3MoeConfig(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[1]),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_separate_experts_compute_the_same(family):
    config = CONFIGS[family]
    config.update({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1})
    config.update({"head_dim": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    separate = separate_experts(copy.deepcopy(fused))
    assert sum(isinstance(module, Experts) for module in separate.modules()) == (2 if family == "mixtral" else 1)
    ids = torch.randint(3, 64, (2, 30))
    torch.testing.assert_close(separate(ids).logits, fused(ids).logits)
    names = {name for name in separate.state_dict() if "experts" in name}
    assert "model.layers.0.mlp.experts.4.down_proj.weight" in names
    assert not any("gate_up" in name for name in names)
    assert separate_experts(separate) is separate  # nothing left to do


def test_gradients_reach_every_expert_that_was_chosen_and_no_other():
    config = CONFIGS["mixtral"]
    experts = (
        separate_experts(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).model.layers[0].mlp.experts
    )
    x, index, weights = torch.randn(3, config.hidden_size), torch.tensor([[0, 1], [1, 3], [3, 0]]), torch.rand(3, 2)
    experts(x, index, weights).square().sum().backward()
    assert [e.down_proj.weight.grad is not None for e in experts] == [True, True, False, True, False]
