"""What quantization cost: perplexity, KL divergence, top-1 agreement and every layer's error, against the original.

Rounding to nearest with the same bits, groups and grid stands beside it, or nobody knows what calibration was good for.
One model is in memory at a time: the original leaves what the others are compared with in a file.

The others are measured in a fresh process, `python -m stages.measuring.quality < request.json > answer.json`:

request: `{"model": folder, "original": folder, "reference": file, "texts": [[ids], …], "messages": […],
"max_new_tokens": 64}`
answer:  `{"missing": […], "answer": …, "quantized": {…}, "rounded": {…}}`, both with `losses`, `kl`, `top1_agreement`
and `layer_errors`
"""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.model import inference
from stages.model.generation import load_engine
from stages.runtime.processes import answer_request

if TYPE_CHECKING:
    from torch import Tensor


Ids = Sequence[int]
POSITIONS = 2048  # that are compared; the logits of 250,000 words take 1 GB, 32 hidden states of 4,096 another


def reference(model: Any, texts: Sequence[Ids], file: Path) -> list[tuple[float, float]]:
    """Leave in `file` what `compared` needs of the original.

    Returns:
        The loss of each text in nats, summed over all its tokens but the first, and how many these are.
    """
    import torch
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    losses = []
    for loss, part, logits, hidden in _walk(model, texts):
        losses.append(loss)
        if not kept:
            count = sum(map(len, _places(texts)))
            kept["logits"] = torch.empty(count, logits.shape[-1], dtype=torch.float16)
            kept["hidden"] = torch.empty(hidden.shape[0], count, hidden.shape[-1])
        kept["logits"][part], kept["hidden"][:, part] = logits.half(), hidden
    save_file(kept, file)
    return losses


def compared(model: Any, texts: Sequence[Ids], file: Path) -> dict[str, Any]:
    """A model against the original.

    Returns:
        `losses`: as `reference` gives them. `kl`: mean over positions of KL(original ‖ model), in nats.
        `top1_agreement`: share of positions where both find the same token likeliest. `layer_errors`: for each layer,
        the first one's first, the mean over positions of ‖h′ − h‖ / ‖h‖, h the original's hidden state after that
        layer (for the last one, after the final norm, too); it carries the errors of the layers before.
    """
    import torch
    from safetensors.torch import load_file

    before = load_file(file)
    losses, divergence, agreed, errors = [], 0.0, 0, torch.zeros(len(before["hidden"]), dtype=torch.float64)
    for loss, part, logits, hidden in _walk(model, texts):
        losses.append(loss)
        was = before["logits"][part].float()
        log_p, log_q = torch.log_softmax(was, dim=-1), torch.log_softmax(logits, dim=-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum())
        agreed += int((was.argmax(dim=-1) == logits.argmax(dim=-1)).sum())
        old = before["hidden"][:, part]
        errors += ((hidden - old).norm(dim=-1) / old.norm(dim=-1)).double().sum(dim=-1)
    count = len(before["logits"])
    return {
        "losses": losses,
        "kl": divergence / count,
        "top1_agreement": agreed / count,
        "layer_errors": (errors / count).tolist(),
    }


def _walk(model: Any, texts: Sequence[Ids]) -> Iterator[tuple[tuple[float, float], slice, "Tensor", "Tensor"]]:
    """Of each text its loss and how many tokens that is of, which of all compared positions it has, and what
    `_forward` gives there; the logits less their largest, so that 16 bits keep most digits of what is likely."""
    import torch

    start = 0
    for text, places in zip(texts, _places(texts), strict=True):
        loss, logits, hidden = _forward(model, text, places)
        part = slice(start, start := start + len(places))
        near = logits - logits.max(dim=-1, keepdim=True).values
        yield (loss, float(len(text) - 1)), part, near.clamp(min=torch.finfo(torch.float16).min), hidden


def _places(texts: Sequence[Ids]) -> list[list[int]]:
    """Of each text the positions that are compared: all that have a next token, or evenly spread ones of these."""
    counts = [len(text) - 1 for text in texts]
    step = max(1.0, sum(counts) / POSITIONS)
    taken = {int(index * step) for index in range(min(sum(counts), POSITIONS))}
    found, start = [], 0
    for count in counts:
        found.append([place for place in range(count) if start + place in taken])
        start += count
    return found


def _forward(model: Any, text: Ids, places: list[int]) -> tuple[float, "Tensor", "Tensor"]:
    """The text's loss, and at some positions P the logits (P × V) and hidden states (layers × P × D), in float32."""
    import torch

    ids = torch.tensor([list(text)], device=model.device)
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits, targets, loss = out.logits[0], ids[0, 1:], 0.0
        for start in range(0, len(targets), inference.CHUNK):
            part = slice(start, min(start + inference.CHUNK, len(targets)))
            loss += float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
        states = torch.stack([state[0, places].float().cpu() for state in out.hidden_states[1:]])
        return loss, logits[places].float().cpu(), states


def rounded(model: Any, made: Path) -> str | None:
    """Round to nearest, in place, every layer that is quantized in `made`: with its bits, groups, symmetry and `mse`.

    Groups are of neighbouring inputs, which with `desc_act` those of GPTQ are not. Returns why it cannot be done.
    """
    import torch
    from safetensors import safe_open
    from transformers.pytorch_utils import Conv1D

    settings = json.loads((made / "quantize_config.json").read_text(encoding="utf-8"))
    modules = dict(model.named_modules())
    for file in sorted(made.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            stored = list(weights.keys())
        for name in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
            weight = getattr(modules.get(name), "weight", None)
            if weight is None:
                return f"the original has no module `{name}`"
            if weight.is_meta:
                return "the original does not fit into memory whole"
            matrix = weight.data.T if isinstance(modules[name], Conv1D) else weight.data
            matrix.copy_(nearest(matrix, settings))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    model.to(getattr(torch, config.get("dtype") or config.get("torch_dtype")))
    return None


def nearest(weight: "Tensor", settings: Mapping[str, Any]) -> "Tensor":
    """A matrix (outputs × inputs) rounded to nearest, on the grid that GPTQModel lays for the same settings."""
    import torch
    from gptqmodel.quantization.quantizer import Quantizer, quantize

    grid = SimpleNamespace(bits=settings["bits"], sym=settings["sym"], mse=settings["meta"].get("mse", 0.0))
    size = settings["group_size"] if settings["group_size"] > 0 else weight.shape[1]
    parts = []
    for group in weight.float().split(size, dim=1):
        quantizer = Quantizer(grid)
        quantizer.configure(perchannel=True)
        quantizer.find_params(group, weight=True)
        parts.append(quantize(group, quantizer.scale, quantizer.zero, quantizer.maxq, False))
    return torch.cat(parts, dim=1)


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, in this process."""
    made, original, texts = Path(request["model"]), request["original"], request["texts"]
    file = Path(request["reference"])
    engine = load_engine([str(made)])
    if engine.missing:
        return {"missing": list(engine.missing)}
    answer = engine.answer(request["messages"], request["max_new_tokens"])
    found = {"missing": [], "answer": answer, "quantized": compared(engine.model, texts, file)}
    del engine
    gc.collect()
    model = load_engine([original]).model
    why = rounded(model, made)
    return {**found, "rounded": {"why": why} if why else compared(model, texts, file)}


if __name__ == "__main__":
    answer_request(respond)
