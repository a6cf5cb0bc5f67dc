"""The merged folder is the chain: the same logits, tokenizer and template, in files that a stranger loads."""

import json
import re
import shutil

import pytest

from stages import merge
from stages.model.facts import read_facts
from stages.model.folder import carried_files, load_model
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

PROBE = "感冒了要不要吃抗生素？多休息，多喝水。"
KINDS = {
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"down_proj": 5}},
    "DoRA": {"use_dora": True},
}


def logits(model, folder):
    import torch
    from transformers import AutoTokenizer

    with torch.no_grad():
        return model.eval()(**AutoTokenizer.from_pretrained(folder)(PROBE, return_tensors="pt")).logits


def served(folder):
    """The logits of a folder as a stranger loads it."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return logits(model, folder)


def trained(chain):
    """The logits of a chain as its last stage trained: PEFT folds all adapters but the last, which stays beside."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chain[0])
    for adapter in chain[1:]:
        model = PeftModel.from_pretrained(model, adapter)
        if adapter != chain[-1]:
            model = model.merge_and_unload()
    return logits(model, chain[-1])


def merged(chain, out, **settings):
    return merge.run(merge.Config(model="chain", **settings), Inputs(model=list(map(str, chain))), out)


@pytest.mark.parametrize("count", [1, 2], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["bloom", "llama", "qwen2", "qwen3"])
def test_the_merged_model_answers_as_the_chain(tiny, adapt, tmp_path, architecture, tied, count):
    chain = [tiny(architecture, tied=tied)]
    for seed in range(count):
        chain.append(adapt(chain, seed))
    metrics = merged(chain, tmp_path)
    expected = trained(chain)
    assert (served(tmp_path) - expected).abs().max() <= 1e-4
    assert (served(chain[0]) - expected).abs().max() > 0.01
    assert (metrics["adapters"], metrics["shards"]) == (count, 1)
    assert metrics["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert 0 < metrics["layer_difference"] <= 1e-5
    linear = [name for name in read_facts(chain[0]).linear_modules() if "lm_head" not in name]
    assert metrics["layers"] == count * len(linear) > 0


@pytest.mark.parametrize("count", [1, 2], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_merged(tiny, adapt, tmp_path, kind, count):
    chain = [tiny("llama")]
    for seed in range(count):
        chain.append(adapt(chain, seed, **KINDS[kind]))
    merged(chain, tmp_path)
    assert (served(tmp_path) - trained(chain)).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 2], ids=["one adapter", "two adapters"])
def test_modules_that_were_trained_whole_are_merged(tiny, adapt, tmp_path, count):
    chain = [tiny("qwen3", tied=False)]
    for seed in range(count):
        chain.append(adapt(chain, seed, modules_to_save=["lm_head", "embed_tokens"]))
    merged(chain, tmp_path)
    assert (served(tmp_path) - trained(chain)).abs().max() <= 1e-4


@pytest.mark.parametrize("architecture", ["bloom", "llama", "qwen2", "qwen3"])
def test_tied_embeddings_stay_tied(tiny, adapt, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    base = tiny(architecture)
    merged([base, adapt([base])], tmp_path)
    assert "lm_head.weight" not in read_facts(tmp_path).weights
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_large_model_is_written_as_several_files_and_an_index(tiny, adapt, tmp_path):
    chain = [tiny("llama", tied=False)]
    chain.append(adapt(chain))
    metrics = merged(chain, tmp_path, shard_size="0.15MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert metrics["shards"] == len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == read_facts(chain[0]).weights.keys()
    assert all((tmp_path / name).stat().st_size < 160_000 for name in files)
    assert (served(tmp_path) - trained(chain)).abs().max() <= 1e-4


def test_a_base_in_several_files_is_merged(tiny, adapt, tmp_path):
    from transformers import AutoModelForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    source = tiny("qwen2", tied=False)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(base, max_shard_size="150KB")
    for path in carried_files(source):
        shutil.copy(path, base)
    assert len(list(base.glob("*.safetensors"))) > 2
    chain = [base, adapt([base])]
    merged(chain, out)
    assert (served(out) - trained(chain)).abs().max() <= 1e-4


@pytest.mark.parametrize(("architecture", "prefix"), [("bloom", "transformer."), ("llama", "model.")])
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_whose_weights_lack_the_prefix_is_merged(tiny, adapt, tmp_path, architecture, prefix, tied):
    """As bigscience's own BLOOM checkpoints on the Hub."""
    from safetensors.torch import load_file, save_file

    base, out = shutil.copytree(tiny(architecture, tied=tied), tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    chain = [base, adapt([base])]
    merged(chain, out)
    assert (served(out) - trained(chain)).abs().max() <= 1e-4


def test_tokenizer_template_and_generation_config_are_carried_byte_for_byte(tiny, adapt, tmp_path):
    base = tiny("llama")
    adapter = adapt([base])
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.3}', encoding="utf-8")
    merged([base, adapter], tmp_path)
    carried = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in carried:
        assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()
    own = ["config.json", "events.jsonl", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*carried, *own])


def test_a_bfloat16_base_stays_bfloat16(tiny, adapt, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).save_pretrained(base)
    for path in carried_files(tiny("llama")):
        shutil.copy(path, base)
    merged([base, adapt([base])], out)
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_without_adapters_is_copied(tiny, tmp_path):
    base = tiny("llama")
    assert merged([base], tmp_path)["layer_difference"] == 0
    assert (served(tmp_path) - served(base)).abs().max() == 0


def test_an_adapter_of_another_model_is_refused(tiny, adapt, tmp_path):
    adapter = adapt([tiny("bloom")], target_modules=["query_key_value"])
    with pytest.raises(StageError) as caught:
        merged([tiny("qwen2"), adapter], tmp_path)
    assert str(caught.value) == (
        f"4 tensors of the adapter `{adapter}` have no place in the base (first "
        "`base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight`): it was trained on another "
        "model, or its kind cannot be folded"
    )


def test_a_merge_that_went_wrong_is_noticed(tiny, adapt, tmp_path, monkeypatch):
    from stages.model.lora import Adapter

    monkeypatch.setattr(Adapter, "scale", lambda self, module: 1.0)  # it is lora_alpha 8 / r 4
    base = tiny("llama")
    adapter = adapt([base])
    with pytest.raises(StageError) as caught:
        merged([base, adapter], tmp_path)
    assert re.fullmatch(
        r"the merged model is not the chain: the outputs of `model.layers.0.mlp.down_proj` after the adapter "
        rf"`{adapter}` differ from those of PEFT by up to [0-9.]+ of [0-9.]+; please report this",
        str(caught.value),
    )


def halved(folder, out):
    """A model folder in bfloat16, as those on the Hub are."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, out)
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(out)
    return out


def test_in_bfloat16_a_lost_adapter_is_seen_and_the_stage_after_starts_from_the_merged_bits(tiny, adapt, tmp_path):
    import torch

    chain = [halved(tiny("llama"), tmp_path / "base")]
    chain += [adapt(chain, 1), adapt(chain, 2)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "lost").mkdir()
    assert merged(chain, tmp_path / "whole")["layer_difference"] <= 1e-5
    started = load_model(list(map(str, chain)), dtype="float32").state_dict()
    written = load_model([str(tmp_path / "whole")], dtype="auto").state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in written.values())
    assert all(torch.equal(started[name], weight.float()) for name, weight in written.items())
    merged(chain[:2], tmp_path / "lost", verify=False)
    with pytest.raises(
        StageError, match=r"^the merged model is not the chain: `model\.layers\.0\..*` is not the folded weight; "
    ):
        merge.verify(list(map(str, chain)), tmp_path / "lost")
