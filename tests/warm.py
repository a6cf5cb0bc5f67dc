"""Imported by a server that stages are forked from, in tests: what each stage would import again after its fork.

No import here starts a Python thread, because a thread does not survive a fork; so GPTQModel is not imported.
"""

import gc
import importlib
import importlib.util

MODULES = [
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.kto_trainer",
    "trl.trainer.reward_trainer",
    "torch.utils.cpp_extension",  # of GPTQModel, as the next two
    "requests",
    "setuptools",
]
OPTIONAL = ["deepspeed", "bitsandbytes"]  # accelerate and PEFT import them where they are installed


def import_all() -> None:
    """Import the modules, and keep the garbage collector of every fork away from them."""
    for name in MODULES + [name for name in OPTIONAL if importlib.util.find_spec(name)]:
        importlib.import_module(name)
    conversions = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once in a process
    gc.collect()
    gc.freeze()


import_all()
