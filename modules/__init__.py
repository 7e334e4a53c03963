"""What converted checkpoints run on. Importing this package registers our models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kit.modules import modeling
from kit.modules.bundler import write_code

modeling.LinearizedPreTrained.write_code = staticmethod(lambda folder: write_code(folder, modeling.__name__))

for _family, _prefix in modeling.FAMILIES.items():
    _config = getattr(modeling, f"Kit{_prefix}Config")
    AutoConfig.register(f"kit_{_family}", _config, exist_ok=True)
    AutoModel.register(_config, getattr(modeling, f"Kit{_prefix}Model"), exist_ok=True)
    AutoModelForCausalLM.register(_config, getattr(modeling, f"Kit{_prefix}ForCausalLM"), exist_ok=True)
