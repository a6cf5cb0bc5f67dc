"""QLoRA: the model after the stage, in every later use, is the model that was trained on the quantized base."""

import json
from types import SimpleNamespace

import pytest

from stages import dpo, merge, reward, sft
from stages.model import quantized
from stages.model.facts import read_facts
from stages.model.folder import load_model
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError
from stages.training.needs import training_needs

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
pytestmark = pytest.mark.train

METHODS = ["nf4", "int8"]
STEPS = {"max_steps": 6}
EXACT = 1e-5  # of logits; the issue of QLoRA merges asks for 0.02


def logits(model):
    import torch

    ids = torch.arange(64)[None] * 7 % 600
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def trained(done):
    """The logits of the model as it was trained, with quantized layers and the adapter beside them."""
    model = done.trainer.model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.train()  # in evaluation its inputs are rounded too
    return logits(model)


def loaded(*folders):
    return logits(load_model(list(map(str, folders))))


def apart(one, other):
    return float((one - other).abs().max())


def bare(chain, tmp_path):
    """The logits of the chain, folded as if its adapters were trained on a base that was not quantized."""
    folders = []
    for number, folder in enumerate(chain[1:]):
        plain = tmp_path / str(number)
        plain.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (plain / name).write_bytes((folder / name).read_bytes())
        folders.append(plain)
    return loaded(chain[0], *folders)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def chain(request, tiny, train, rows):
    """Two stages on a base in NF4, one on the other: the folders, and what was trained."""
    base = tiny(request.param)
    first = train(sft, [base], rows("alpaca", 12), quantized_base="nf4", trainer=STEPS)
    second = train(dpo, [base, first.out], rows("preference", 4), quantized_base="nf4", trainer=STEPS)
    folders = [base, first.out, second.out]
    return SimpleNamespace(folders=folders, first=first, second=second, logits=[trained(first), trained(second)])


def test_what_a_stage_starts_from_is_what_was_trained(chain, tmp_path):
    assert apart(chain.logits[0], loaded(*chain.folders[:2])) < EXACT
    assert apart(chain.logits[1], loaded(*chain.folders)) < EXACT
    assert apart(chain.logits[1], bare(chain.folders, tmp_path)) > 1e-3
    assert apart(chain.logits[1], chain.logits[0]) > 0.01


def test_the_merged_folder_is_what_was_trained_and_its_proof_holds(chain, tmp_path):
    from transformers import AutoModelForCausalLM

    metrics = merge.run(merge.Config(model="chain"), Inputs(model=list(map(str, chain.folders))), tmp_path)
    assert metrics["layers"] == 28 if "llama" in str(chain.folders[0]) else 16  # of two adapters
    assert metrics["layer_difference"] < 1e-6
    assert apart(chain.logits[1], logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())) < EXACT


def test_the_reference_of_dpo_is_the_model_that_it_started_from(chain):
    assert chain.second.metrics["margin_at_start"] == 0.0
    assert chain.second.metrics["loss_at_start"] == pytest.approx(0.693147, abs=1e-6)


def test_the_artifact_says_how_its_base_was_quantized(chain):
    content = json.loads((chain.first.out / quantized.FILE).read_text(encoding="utf-8"))
    modules = content.pop("modules")
    assert content.pop("bitsandbytes")
    known = {"quantized_base": "nf4", "block_size": 64, "double_quantization": True, "dtype": "float32"}
    assert content == known
    assert len(modules) == (14 if "llama" in str(chain.folders[0]) else 8)
    assert not [name for name in modules if "embed" in name or name == "lm_head"]


def test_a_file_that_says_something_else_is_refused(chain, tmp_path):
    for folder in chain.folders[1:2]:
        for path in folder.glob("adapter*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        content = json.loads((folder / quantized.FILE).read_text(encoding="utf-8"))
        (tmp_path / quantized.FILE).write_text(json.dumps({**content, "block_size": 128}), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        loaded(chain.folders[0], tmp_path)
    why = "does not say how the base was quantized in words that are known here; train the adapter again"
    assert str(caught.value) == f"`{tmp_path / quantized.FILE}` {why}"


def test_without_bitsandbytes_the_chain_says_what_to_install(chain, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(StageError) as caught:
        loaded(*chain.folders[:2])
    what = f"the adapter `{chain.folders[1]}` was trained on a base in nf4, and cannot be folded without a package"
    assert str(caught.value) == f"{what}; `pip install bitsandbytes`"


# Kinds of layers and adapters

KINDS = {
    "some layers": ("llama", {"target_modules": ["q_proj"]}),
    "DoRA": ("llama", {"use_dora": True}),
    "whole embeddings": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "rows of tokens": ("llama", {"trainable_token_indices": [3, 599]}),
    "inputs by outputs": ("gpt2", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_folded_as_it_was_trained(tiny, foreign, train, rows, kind):
    architecture, lora = KINDS[kind]
    base = foreign("gpt2") if architecture == "gpt2" else tiny("llama", tied="modules_to_save" not in lora)
    settings = {"lora": {"r": 4, **lora}, "quantized_base": "nf4"}
    done = train(dpo, [base], rows("preference", 4), **settings, trainer={"max_steps": 2})
    assert done.metrics["margin_at_start"] == 0.0
    assert apart(trained(done), loaded(base, done.out)) < EXACT
    assert apart(trained(done), loaded(base)) > 1e-3


def test_layers_without_an_adapter_stay_as_they_were_quantized(tiny, train, rows):
    base = tiny("llama")
    lora = {"r": 4, "target_modules": ["q_proj"]}
    done = train(sft, [base], rows("alpaca", 4), lora=lora, quantized_base="nf4", trainer={"max_steps": 1})
    folded = load_model([str(base), str(done.out)]).state_dict()
    plain = load_model([str(base)]).state_dict()
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in plain if not folded[name].equal(plain[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_int8(tiny, train, rows):
    base = tiny("llama")
    done = train(sft, [base], rows("alpaca", 12), quantized_base="int8", trainer=STEPS)
    assert apart(trained(done), loaded(base, done.out)) < EXACT
    assert json.loads((done.out / quantized.FILE).read_text(encoding="utf-8"))["quantized_base"] == "int8"


def test_a_base_in_bfloat16_is_quantized_and_folded_in_bfloat16(tiny, train, rows, tmp_path):
    base = tiny("llama")
    half, merged = tmp_path / "half", tmp_path / "merged"
    for folder in (half, merged):
        folder.mkdir()
    load_model([str(base)], dtype="bfloat16").save_pretrained(half)
    for path in base.iterdir():
        if not (half / path.name).exists():
            (half / path.name).write_bytes(path.read_bytes())
    done = train(sft, [half], rows("alpaca", 12), quantized_base="nf4", trainer=STEPS)
    assert json.loads((done.out / quantized.FILE).read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    merge.run(merge.Config(model="chain"), Inputs(model=[str(half), str(done.out)]), merged)
    assert apart(trained(done), loaded(merged)) < 0.02  # merged weights are rounded to bfloat16
    assert loaded(merged).equal(loaded(half, done.out))


def test_a_reward_model_scores_as_it_was_trained(tiny, train, rows, monkeypatch):
    import torch
    from transformers import AutoModelForSequenceClassification

    base, seen, save = tiny("llama"), [], reward.save

    def watched(model, *others):
        seen.append(trained(SimpleNamespace(trainer=SimpleNamespace(model=model))))
        save(model, *others)

    monkeypatch.setattr(reward, "save", watched)
    done = train(reward, [base], rows("preference", 4), quantized_base="nf4")
    scorer = AutoModelForSequenceClassification.from_pretrained(done.out).eval()
    assert scorer.dtype == torch.float32
    assert apart(seen[0], logits(scorer)) < EXACT
    assert not (done.out / "adapter").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_takes_the_memory_that_was_said(tiny, rows, method):
    import torch

    base = tiny("llama")
    model = load_model([str(base)], quantized_base=method)
    taken = sum(weight.nbytes for weight in model.parameters())
    for module in model.modules():
        scales = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        if scales is not None:
            taken += scales.absmax.nbytes + scales.state2.absmax.nbytes
        elif getattr(getattr(module, "weight", None), "SCB", None) is not None:
            taken += module.weight.SCB.nbytes
    config = sft.Config(model="m", data=[rows("alpaca", 4)], lora={"r": 4}, quantized_base=method)
    lora = sft.Config(model="m", data=[rows("alpaca", 4)], lora={"r": 4})
    facts = read_facts(base)
    said = [training_needs(one, facts).memory for one in (config, lora)]
    whole = sum(weight.nbytes for weight in load_model([str(base)]).parameters())
    assert said[1] - said[0] == whole - taken
    assert taken < 0.6 * whole
    assert model.dtype == torch.float32


# Gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_gradients_are_those_of_the_weights_that_are_multiplied_with(tiny, method, reentrant):
    import torch
    from peft import LoraConfig, get_peft_model

    base = str(tiny("bloom"))
    small = load_model([base], quantized_base=method)
    plain = load_model([base])
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(small.quantized_base.values(name, weight))
    found = []
    for model in (small, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        if reentrant is not None and model is small:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.arange(48)[None] * 7 % 600
        adapted(input_ids=ids, labels=ids).loss.backward()
        found.append({name: one.grad for name, one in adapted.named_parameters() if one.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)
        assert gradient.abs().max() > 0, name


def test_each_weight_is_quantized_as_its_layer_quantizes_it(tiny):
    import bitsandbytes
    import torch

    weight = load_model([str(tiny("llama"))]).model.layers[0].mlp.up_proj.weight.detach()
    theirs = bitsandbytes.nn.Linear4bit(64, len(weight), bias=False, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), quant_type="nf4", module=theirs)
    theirs.to("cpu")
    ours = quantized.QuantizedBase("nf4", "float32", frozenset(["up"])).values("up.weight", weight)
    with torch.no_grad():
        assert theirs.train()(torch.eye(64)).T.equal(ours)
