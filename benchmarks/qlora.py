"""QLoRA: which merge gives the model that was trained, on tiny models with random weights.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/qlora.py          # a few minutes on a CPU

A base is quantized, an adapter is trained on it (`sft`), then a second one on both (`dpo`). Each row is the largest
|difference| of a logit between the model as it was trained, with quantized layers and the adapters beside them, and a
model in plain layers: the chain as this project folds it, the adapters folded into the base that was never quantized,
and PEFT's `merge_and_unload` into the quantized layers.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages import dpo, init, sft
from stages.chat.template import template_text
from stages.data.source import Source
from stages.model.folder import load_model
from stages.model.inputs import Inputs
from stages.training import loop

DATA = Path(__file__).parent.parent / "data"
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1000}
TRAINER = {
    **{"max_steps": 15, "per_device_train_batch_size": 4, "max_length": 256, "learning_rate": 1e-2},
    **{"save_strategy": "no", "gradient_checkpointing": False},
}


def logits(model: Any) -> Any:
    """The logits of 256 positions."""
    import torch

    ids = torch.arange(256).reshape(2, 128) * 7 % 1000
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def as_trained(model: Any) -> Any:
    """The logits of the model in evaluation; layers in int8 stay in training, where inputs are not rounded."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.train()
    return logits(model)


def train(stage: Any, chain: list[Path], data: Source, out: Path, method: str) -> tuple[Path, Any]:
    """Train a stage; its folder, and the model as it was trained."""
    seen: list[Any] = []
    real = loop.train

    def watched(trainer: Any, *others: Any) -> Any:
        seen.append(trainer)
        return real(trainer, *others)

    out.mkdir()
    settings = {"lora": {"r": 8}, "quantized_base": method, "trainer": TRAINER}
    with patch.object(loop, "train", watched):
        stage.run(stage.Config(model="base", data=[data], **settings), Inputs(model=list(map(str, chain))), out)
    return out, seen[0].model


def bare(folder: Path, out: Path) -> Path:
    """The adapter without what says how its base was quantized."""
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


def merged_in_place(chain: list[Path], method: str) -> Any:
    """The last adapter of the chain in the quantized layers, as PEFT's `merge_and_unload` leaves it."""
    from peft import PeftModel

    model: Any = load_model(list(map(str, chain[:-1])), quantized_base=method)
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[method], True)
    return PeftModel.from_pretrained(model, chain[-1]).merge_and_unload()


def compare(architecture: str, method: str, work: Path) -> list[tuple[str, Any, Any, Any]]:
    """For each stage its name, and the largest differences of the three merges."""
    rows = {
        "alpaca": Source(path=str(DATA / "med_qa.json"), format="alpaca", max_samples=60),
        "preference": Source(path=str(DATA / "med_prefer.jsonl"), format="preference", max_samples=60),
    }
    chain = [work / "base"]
    chain[0].mkdir()
    made = init.Config(architecture=architecture, data=[rows["alpaca"]], template=template_text("med"), **SIZES)
    init.run(made, Inputs(), chain[0])
    plain, found = [chain[0]], []
    for stage, kind in ((sft, "alpaca"), (dpo, "preference")):
        name = stage.__name__.rpartition(".")[2]
        folder, model = train(stage, chain, rows[kind], work / name, method)
        chain.append(folder)
        plain.append(bare(folder, work / f"{name}-bare"))
        trained = as_trained(model)

        def apart(other: Callable[[], Any], trained: Any = trained) -> float:
            return float((other() - trained).abs().max())

        found.append(
            (
                name,
                apart(lambda: logits(load_model(list(map(str, chain))))),
                apart(lambda: logits(load_model(list(map(str, plain))))),
                apart(lambda: as_trained(merged_in_place(chain, method))),
            )
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["nf4", "int8"])
    given = parser.parse_args()
    print(
        "| model | base | after | this fold | into the base in 16 or 32 bits | `merge_and_unload` |\n"
        + "|---" * 6
        + "|"
    )
    for architecture in ("llama", "bloom"):
        for method in given.methods:
            with tempfile.TemporaryDirectory() as work:
                for name, *figures in compare(architecture, method, Path(work)):
                    print(f"| {architecture} | {method} | `{name}` |", " | ".join(f"{one:.2g}" for one in figures), "|")


if __name__ == "__main__":
    main()
