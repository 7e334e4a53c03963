"""What converted checkpoints run on. Importing this package registers our models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kit.modules import modeling, quantized, sparsity
from kit.modules.bundler import write_code

modeling.LinearizedPreTrained.write_code = staticmethod(lambda folder: write_code(folder, modeling.__name__))
sparsity.SparsePreTrained.write_code = staticmethod(lambda folder: write_code(folder, sparsity.__name__))

for _module, _name in ((modeling, "Kit"), (quantized, "KitQuantized"), (sparsity, "KitSparse")):
    for _prefix in _module.FAMILIES.values():
        _config = getattr(_module, f"{_name}{_prefix}Config")
        AutoConfig.register(_config.model_type, _config, exist_ok=True)
        AutoModel.register(_config, getattr(_module, f"{_name}{_prefix}Model"), exist_ok=True)
        AutoModelForCausalLM.register(_config, getattr(_module, f"{_name}{_prefix}ForCausalLM"), exist_ok=True)
