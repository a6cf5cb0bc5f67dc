"""Weights written one at a time: the files of safetensors itself, and memory for one weight."""

import json
import subprocess
import sys

import pytest

from stages.model import shards

pytestmark = pytest.mark.train


def tensors():
    """A tensor of each dtype that files of models have; sizes are odd, so that some begin at any byte."""
    import torch

    kinds = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    kinds += ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64"]
    made = {f"h.{number}.{kind}": torch.ones(3, 5).to(getattr(torch, kind)) for number, kind in enumerate(kinds)}
    return {**made, "a": torch.tensor(2.5), "é": torch.zeros(0, 4), "z": torch.arange(7)[::2].float()}


@pytest.mark.parametrize("limit", [10**9, 120])
def test_the_files_are_those_of_safetensors_byte_for_byte(tmp_path, limit):
    from safetensors.torch import save_file

    source, out, expected = (tmp_path / name for name in ("source", "out", "expected"))
    for folder in (source, out, expected):
        folder.mkdir()
    content = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(content, source / "model.safetensors", metadata={"format": "pt", "made": "elsewhere"})
    count = shards.write(shards.Weights(source), lambda name, weight: weight, out, limit)
    files = sorted(out.glob("*.safetensors"))
    assert count == len(files)
    if limit == 120:
        index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"].keys() == content.keys()
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in content.values())}
        own = {file.name: [name for name in content if index["weight_map"][name] == file.name] for file in files}
    else:
        own = {"model.safetensors": list(content)}
    for file in files:
        save_file({name: content[name] for name in own[file.name]}, expected / file.name, metadata={"format": "pt"})
        assert file.read_bytes() == (expected / file.name).read_bytes()


PEAK = """
import sys
from pathlib import Path
from stages import merge
from stages.model.inputs import Inputs

def line(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

small, large, out = map(Path, sys.argv[1:])
for verify in (True, False):
    for number, folder in enumerate((small, small, large)):  # the first one imports
        target = out / f"{verify}-{number}"
        target.mkdir(parents=True)
        before = line("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        chain = [str(folder / "base"), str(folder / "adapter")]
        merge.run(merge.Config(model="base", verify=verify), Inputs(model=chain), target)
        print("PEAK", line("VmHWM") - before)
"""


def test_a_deeper_model_takes_no_more_memory(tmp_path):
    """Weights of 76 and 192 MB, of which the largest has 33 MB."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 32_000}
    for layers in (2, 24):
        folder = tmp_path / str(layers)
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **sizes), dtype=torch.bfloat16)
        model.save_pretrained(folder / "base")
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / "adapter")
    folders = [str(tmp_path / name) for name in ("2", "24", "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], check=True, stdout=subprocess.PIPE, text=True)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    for _, small, large in (peaks[:3], peaks[3:]):
        assert abs(large - small) < small / 10, peaks
