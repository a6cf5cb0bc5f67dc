"""What quantization costs: perplexity, KL divergence, top-1 agreement and the errors of every layer.

A quantized model, and the original rounded to nearest with the same bits, groups and grid, are compared with the
original; the gap between the two is what calibration gains. One model is in memory at a time: what the comparison needs
of the original waits in a file.

The original is measured in this process; the other two in a fresh process,
`python -m stages.measuring.quality < request.json > answer.json`:

request: `{"model": folder, "original": folder, "reference": file, "texts": [[ids], …], "messages": […],
"max_new_tokens": 64}`
answer:  `{"missing": […], "answer": …, "quantized": {…}, "rounded": {…}}`, the last two as `compared` returns them
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.measuring.metrics import Measured, Ratio, compare_models
from stages.model import inference
from stages.model.device import free_memory
from stages.model.folder import refuse_missing
from stages.model.generation import load_engine
from stages.model.gptq import round_to_nearest
from stages.runtime.errors import StageError
from stages.runtime.events import emit
from stages.runtime.processes import answer_request, in_fresh_process

if TYPE_CHECKING:
    from torch import Tensor

Ids = Sequence[int]
POSITIONS = 2048  # that are compared; the logits of 250,000 words take 1 GB, 32 hidden states of 4,096 another
NEW_TOKENS = 64  # of the answer to the question


def measure_original(folder: Path, texts: Sequence[Ids], file: Path) -> list[Ratio]:
    """The losses of the original, as `reference` returns them; what the comparison needs is left in `file`.

    Raises:
        StageError: the folder lacks weights, or its perplexity is not a number.
    """
    engine = load_engine([str(folder)])
    refuse_missing(str(folder), engine.missing)
    losses = reference(engine.model, texts, file)
    del engine
    free_memory()
    if not math.isfinite(found := perplexity(losses)):
        raise StageError(f"the perplexity of `{folder}` is {found} before quantization; check the stage before")
    return losses


def measure_quantized(made: Path, original: Path, file: Path, texts: Sequence[Ids], question: str) -> dict[str, Any]:
    """Load a quantized folder in a fresh process, ask it the question, and compare it with the original.

    Returns:
        The answer of the process, described above.

    Raises:
        StageError: the folder lacks weights.
    """
    asked = [{"role": "user", "content": question}]
    request = {"model": str(made), "original": str(original), "reference": str(file), "texts": texts}
    found = in_fresh_process("stages.measuring.quality", {**request, "messages": asked, "max_new_tokens": NEW_TOKENS})
    if found["missing"]:
        names = ", ".join(found["missing"][:5])
        raise StageError(f"transformers cannot load the quantized model: it finds no {names}; quantize all layers")
    return found


def quality_figures(before: Sequence[Ratio], measured: Mapping[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """The figures of the quantized model and of rounding to nearest, both against the original.

    `before` is what `measure_original` returned, `measured` what `measure_quantized` did; a warning goes to `out`.

    Raises:
        StageError: the quantized model's perplexity is not a number.
    """
    after = perplexity(measured["quantized"]["losses"])
    if not math.isfinite(after):
        raise StageError(f"the quantized model's perplexity is {after}; use more rows or more `bits`")
    original, quantized = Measured(before), _losses(measured["quantized"])
    found = {"quantized": _against(original, measured["quantized"], seed), "rounded": measured["rounded"]}
    if "why" not in measured["rounded"]:
        found["rounded"] = _against(original, measured["rounded"], seed)
        change = compare_models("perplexity", quantized, _losses(measured["rounded"]), seed)
        _warn(change, measured["quantized"]["kl"] < measured["rounded"]["kl"], out)
    return {"perplexity_before": perplexity(before), "perplexity_after": after, **found}


def _losses(compared: Mapping[str, Any]) -> Measured:
    return Measured([tuple(row) for row in compared["losses"]])


def _against(original: Measured, compared: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The figures of a model against those of the original, or why there are none."""
    change = compare_models("perplexity", _losses(compared), original, seed)
    if change["why"] is not None:
        return {"why": change["why"]}
    figures = {key: compared[key] for key in ("kl", "top1_agreement", "layer_errors")}
    ratio = {"ratio": change["change"], "ratio_ci": change["ci"]}
    return {"perplexity": perplexity(compared["losses"]), **ratio, **figures}


def _warn(change: Mapping[str, Any], closer: bool, out: Path) -> None:
    """Report that rounding to nearest has the lower perplexity beyond chance, unless GPTQ is `closer` to the original.

    Closer is by KL divergence: with 8 bits, rounding may lower the perplexity by luck.
    """
    if change["better"] == 0 and not closer:
        low, high = change["ci"]
        times = f"{change['change']:.3f} times the perplexity, 95 % CI {low:.3f} to {high:.3f}"
        way = "calibrate with more and longer rows, of the kind that the model will see"
        emit(out, "note", text=f"GPTQ lost more than rounding to nearest does ({times}): {way}", warning=True)


def perplexity(losses: Sequence[Ratio]) -> float:
    """exp(Σ loss / Σ tokens); infinite above e^700, NaN if a loss is."""
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


# One model at a time


def reference(model: Any, texts: Sequence[Ids], file: Path) -> list[tuple[float, float]]:
    """Measure the original, and leave in `file` what `compared` needs of it.

    Returns:
        Of each text its loss in nats, summed over all tokens but the first, and the number of these tokens.
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
    """Compare a model with the original.

    Returns:
        `losses`: as `reference` returns them. `kl`: mean over positions of KL(original ‖ model), in nats.
        `top1_agreement`: share of positions where both models find the same token likeliest. `layer_errors`: for each
        layer in order, the mean over positions of ‖h′ − h‖ / ‖h‖, where h is the original's hidden state after the
        layer, and for the last layer after the final norm too. Errors of earlier layers are part of it.
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
    """Of each text its loss and the number of tokens in it, its part of all compared positions, and the logits and
    hidden states at these (see `_forward`).

    The largest logit of a position is subtracted from all, so that in 16 bits likely tokens keep most digits.
    """
    import torch

    start = 0
    for text, places in zip(texts, _places(texts), strict=True):
        loss, logits, hidden = _forward(model, text, places)
        part = slice(start, start := start + len(places))
        near = logits - logits.max(dim=-1, keepdim=True).values
        yield (loss, float(len(text) - 1)), part, near.clamp(min=torch.finfo(torch.float16).min), hidden


def _places(texts: Sequence[Ids]) -> list[list[int]]:
    """Of each text the positions that are compared: all that have a next token, or `POSITIONS` spread evenly."""
    counts = [len(text) - 1 for text in texts]
    step = max(1.0, sum(counts) / POSITIONS)
    taken = {int(index * step) for index in range(min(sum(counts), POSITIONS))}
    found, start = [], 0
    for count in counts:
        found.append([place for place in range(count) if start + place in taken])
        start += count
    return found


def _forward(model: Any, text: Ids, places: list[int]) -> tuple[float, "Tensor", "Tensor"]:
    """The loss of a text, and at P positions the logits (P × V) and hidden states (layers × P × D), in float32."""
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
    """Round to nearest, in place, every layer that is quantized in the folder `made`, with the settings of that folder.

    A group is of neighbouring inputs; with `desc_act`, a group of GPTQ is not.

    Returns:
        Why it cannot be done; None if it is done.
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
            matrix.copy_(round_to_nearest(matrix, settings))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    model.to(getattr(torch, config.get("dtype") or config.get("torch_dtype")))
    return None


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request, described above, in this process."""
    made, original, texts = Path(request["model"]), request["original"], request["texts"]
    file = Path(request["reference"])
    engine = load_engine([str(made)])
    if engine.missing:
        return {"missing": list(engine.missing)}
    answer = engine.answer(request["messages"], request["max_new_tokens"])
    found = {"missing": [], "answer": answer, "quantized": compared(engine.model, texts, file)}
    del engine
    free_memory()
    model = load_engine([original]).model
    why = rounded(model, made)
    return {**found, "rounded": {"why": why} if why else compared(model, texts, file)}


if __name__ == "__main__":
    answer_request(respond)
