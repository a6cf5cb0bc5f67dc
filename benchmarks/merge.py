"""`merge` against PEFT's `merge_and_unload`: peak memory, time, and the bits that they write.

    PYTHONPATH=. python benchmarks/merge.py                  # models of 0.5 and 4 GB; 17 GB of disk
    PYTHONPATH=. python benchmarks/merge.py --layers 2 --runs 1

The models have Llama's layers, 2,048 wide, with random weights in bfloat16, and one adapter of rank 16 on every linear
layer. Weights are made and written layer by layer. Each run is a process of its own; sides take turns. Memory is the
largest resident set (VmHWM) during the merge, above what is resident after all imports, a small merge included. It
counts pages of files that are mapped into memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WIDTH, VOCABULARY, RANK = 2048, 32_000, 16
SIDES = ("merge", "merge, verify: false", "PEFT")


def linear(width: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a layer: name → outputs and inputs."""
    inner = width * 11 // 4
    attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    ends = {"mlp.down_proj": (width, inner)}
    return {**attention, **{f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}, **ends}


def make(folder: Path, layers: int, width: int = WIDTH, vocabulary: int = VOCABULARY) -> None:
    """Write a base and an adapter with random weights, one layer in memory at a time."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "vocab_size": vocabulary}
    sizes |= {"num_attention_heads": 16, "num_hidden_layers": layers}
    config = LlamaConfig(tie_word_embeddings=False, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=random)).bfloat16()

    index: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, base / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    ends = {"model.embed_tokens.weight": weight(vocabulary, width), "lm_head.weight": weight(vocabulary, width)}
    write("ends.safetensors", {**ends, "model.norm.weight": torch.ones(width).bfloat16()})
    parts: dict[str, torch.Tensor] = {}
    for number in range(layers):
        own = f"model.layers.{number}"
        norms = {
            f"{own}.{name}.weight": torch.ones(width).bfloat16()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        write(
            f"layer{number}.safetensors",
            {**norms, **{f"{own}.{name}.weight": weight(*size) for name, size in linear(width).items()}},
        )
        for name, (outputs, inputs) in linear(width).items():
            parts[f"base_model.model.{own}.{name}.lora_A.weight"] = weight(RANK, inputs).float()
            parts[f"base_model.model.{own}.{name}.lora_B.weight"] = weight(outputs, RANK).float()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(parts, adapter / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in linear(width)]
    LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(adapter)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def merge(side: str, folder: Path, out: Path) -> None:
    """One merge."""
    import torch

    chain = [str(folder / "base"), str(folder / "adapter")]
    if side == "PEFT":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(chain[0], dtype="auto")
            merged: Any = PeftModel.from_pretrained(model, chain[1]).merge_and_unload()
            merged.save_pretrained(out, max_shard_size="4GB")
        return
    from stages import merge as stage
    from stages.model.inputs import Inputs

    stage.run(stage.Config(model="base", verify=side == "merge"), Inputs(model=chain), out)


def measure(side: str, small: Path, folder: Path, out: Path) -> None:
    """Print seconds and bytes of one merge; a small one before it does all imports."""
    with tempfile.TemporaryDirectory() as other:
        merge(side, small, Path(other))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start, used = time.perf_counter(), time.process_time()
    merge(side, folder, out)
    spent = {"seconds": time.perf_counter() - start, "processor": time.process_time() - used}
    print(json.dumps({**spent, "memory": status("VmHWM") - before}))


def differing(first: Path, second: Path) -> tuple[int, int]:
    """The weights in two folders that are not the same number, and all weights."""
    from stages.model.shards import Weights

    one, other = Weights(first), Weights(second)
    differ = total = 0
    for name in one.entries:
        a, b = one.read(name), other.read(name)
        differ += int((a != b).sum())
        total += a.numel()
    return differ, total


def main() -> None:
    """Make models, merge them, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 38])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=4)
    given = parser.parse_args()
    if given.one:
        side, *paths = given.one
        return measure(side, *map(Path, paths))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {libraries}")
    print("| model | side | seconds | all | processor seconds | all | MB above imports | all |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        small = Path(scratch, "small")
        small.mkdir()
        make(small, 1, 64, 1000)
        for layers in given.layers:
            folder = Path(scratch, str(layers))
            folder.mkdir()
            make(folder, layers)
            compare(small, folder, given.runs)
    return None


def compare(small: Path, folder: Path, runs: int) -> None:
    """Merge one model `runs` times on each side, and print the rows of the table."""
    stored = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            out = folder / side
            out.mkdir(exist_ok=True)
            for file in out.iterdir():
                file.unlink()
            command = [sys.executable, __file__, "--one", side, str(small), str(folder), str(out)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[side].append(json.loads(done.stdout.splitlines()[-1]))
    for side, found in figures.items():
        cells = [f"{stored / 1e9:.2f} GB", side]
        for name, scale, digits in (("seconds", 1, 1), ("processor", 1, 1), ("memory", 1e6, 0)):
            values = [one[name] / scale for one in found]
            cells += [f"{statistics.median(values):,.{digits}f}", ", ".join(f"{one:,.{digits}f}" for one in values)]
        print(" | ".join(["", *cells, ""]).strip(), flush=True)
    differ, total = differing(folder / SIDES[0], folder / SIDES[-1])
    print(f"{differ:,} of {total:,} weights differ between merge and PEFT\n", flush=True)


if __name__ == "__main__":
    main()
