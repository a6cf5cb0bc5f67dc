"""What quantization costs, computed beside plain torch."""

import json
import shutil

import pytest

from stages.measuring import quality
from stages.model.facts import read_facts
from stages.model.generation import load_engine
from stages.runtime.errors import StageError
from stages.runtime.events import read_events


@pytest.fixture
def quantized(tiny, tmp_path):
    """A folder as `quantize` leaves it, as far as rounding to nearest reads it."""
    import torch
    from safetensors.torch import save_file

    source = tiny("llama", tied=False)
    inner = [name for name, shape in read_facts(source).weights.items() if ".layers." in name and len(shape) == 2]
    names = [name.removesuffix("weight") + "qweight" for name in inner]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    settings = {"bits": 4, "sym": True, "group_size": 32, "meta": {}}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return tmp_path


def measure(folder, adapter, made, work):
    """An original against itself, against another model, and against its own rounding, beside plain torch."""
    import torch

    texts = [[5, 6, 7, 8, 9, 10], [20, 21, 22], list(range(30, 60))]
    first, second, near = (load_engine(chain).model for chain in ([folder], [folder, adapter], [folder]))
    with torch.no_grad():
        for model in (first, second):
            model.lm_head.weight *= 20  # an untrained model finds all tokens about as likely
    assert quality.rounded(near, made) is None
    losses = quality.reference(first, texts, work / "original.safetensors")
    found = [quality.compared(model, texts, work / "original.safetensors") for model in (first, second)]
    ours = plain(first, second, texts)
    weight, rounded = (dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"] for model in (first, near))
    groups = weight.detach().float().reshape(-1, 32)
    scale = 2 * groups.abs().amax(dim=1, keepdim=True) / 15
    expected = (scale * (torch.clamp(torch.round(groups / scale) + 8, 0, 15) - 8)).bfloat16().float()
    return losses, found, ours, float((rounded.detach().float().reshape(-1, 32) - expected).abs().max())


def plain(first, second, texts):
    import torch

    sums, divergence, agreed, errors = [], [], [], []
    with torch.no_grad():
        for text in texts:
            one, two = (model(torch.tensor([text]), output_hidden_states=True) for model in (first, second))
            log_p, log_q = (torch.log_softmax(out.logits[0, :-1].float(), -1) for out in (one, two))
            sums.append(-float(log_p.gather(1, torch.tensor(text[1:])[:, None]).sum()))
            divergence += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            agreed += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
            states = torch.stack(one.hidden_states[1:])[:, 0, :-1], torch.stack(two.hidden_states[1:])[:, 0, :-1]
            errors.append((states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1))
    mean = torch.cat(errors, dim=1).mean(dim=1)
    return sums, sum(divergence) / len(divergence), sum(agreed) / len(agreed), mean.tolist()


@pytest.mark.train
def test_what_quantization_cost_is_what_plain_torch_says(tiny, adapt, quantized, apart, tmp_path):
    folder = tiny("llama", tied=False)
    losses, (same, changed), (sums, kl, agreed, errors), gap = apart(
        measure, str(folder), str(adapt([folder])), quantized, tmp_path
    )
    assert [loss for loss, _ in losses] == pytest.approx(sums, abs=1e-4)
    assert [count for _, count in losses] == [5, 2, 29]
    assert same["losses"] == losses
    assert (same["top1_agreement"], same["layer_errors"]) == (1, [0, 0])
    assert same["kl"] == pytest.approx(0, abs=1e-4)
    assert changed["kl"] == pytest.approx(kl, rel=1e-3)
    assert changed["top1_agreement"] == agreed < 1
    assert changed["layer_errors"] == pytest.approx(errors, rel=1e-4)
    assert gap == 0


def rounded_of(folder, made):
    return quality.rounded(load_engine([str(folder)]).model, made)


@pytest.mark.train
def test_what_cannot_be_rounded_says_why(tiny, quantized, apart):
    assert apart(rounded_of, tiny("bloom"), quantized) == "the original has no module `model.layers.0.mlp.down_proj`"


def test_positions_are_spread_over_all_texts(monkeypatch):
    texts = [range(5), range(2), range(9)]
    assert quality._places(texts) == [[0, 1, 2, 3], [0], [0, 1, 2, 3, 4, 5, 6, 7]]
    monkeypatch.setattr(quality, "POSITIONS", 5)
    assert quality._places(texts) == [[0, 2], [], [0, 2, 5]]


def notes(out):
    return [event["text"] for event in read_events(out) if event["kind"] == "note"]


def test_rounding_to_nearest_that_is_better_is_reported(tmp_path):
    quality._warn({"better": None, "change": 1.1, "ci": [0.9, 1.2]}, False, tmp_path)
    quality._warn({"better": 1, "change": 0.8, "ci": [0.7, 0.9]}, False, tmp_path)
    quality._warn({"better": 0, "change": 1.004, "ci": [1.003, 1.005]}, True, tmp_path)
    assert notes(tmp_path) == []
    quality._warn({"better": 0, "change": 1.1, "ci": [1.05, 1.2]}, False, tmp_path)
    assert notes(tmp_path) == [
        "GPTQ lost more than rounding to nearest does (1.100 times the perplexity, 95 % CI 1.050 to 1.200): calibrate "
        "with more and longer rows, of the kind that the model will see"
    ]


@pytest.mark.train
def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a fresh process could not use (.|\n)*config\.json"):
        quality.measure_quantized(tmp_path, tmp_path, tmp_path / "original.safetensors", [], "a question")


@pytest.mark.train
def test_an_original_that_lacks_weights_is_not_quantized(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"lacks weights, which would be random: `model\.norm\.weight`;"):
        quality.measure_original(folder, [[1, 2, 3]], tmp_path / "original.safetensors")
