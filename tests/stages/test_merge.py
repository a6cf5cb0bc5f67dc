"""The merged folder is the chain: the same logits, tokenizer and template, in files that a stranger loads."""

import json
import re
import shutil

import pytest

from stages import merge
from stages.model import shards
from stages.model.facts import read_facts
from stages.model.folder import carried_files, load_model
from stages.model.inputs import Inputs
from stages.model.lora import PREFIX, Adapter, AdapterChain, Layout
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


def refused(trouble, adapter=None):
    """A pattern of the whole message; `~` stands for a figure, ADAPTER for the folder."""
    text = f"the merged model is not the chain: {trouble}; please report this".replace("ADAPTER", f"`{adapter}`")
    return f"^{'[0-9.e-]+'.join(map(re.escape, text.split('~')))}$"


def swapped(real):
    """The tensors of layers 0 and 1 in each other's place."""

    def take(self, name):
        other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
        return real(self, re.sub(r"layers\.[01]\.", lambda found: other[found[0]], name))

    return take


def forgetful(real):
    """A fold that forgets whole modules, and says that they are folded."""

    def fold(self, name, weight, **settings):
        folded = real(self, name, weight, **settings)
        return weight if PREFIX + name in self.names else folded

    return fold


Q = "model.layers.0.self_attn.q_proj"
DIFFERS = "the outputs of `MODULE` after the adapter ADAPTER differ from those of PEFT by up to ~ of ~"
WHOLE = "`lm_head` after the adapter ADAPTER: its weight is not that of the adapter"
# A damaged fold → what it is shown on: settings of the adapter, the damage, the message.
FOLDS = {
    "a wrong scale": ({}, ("scale", lambda real: lambda self, module: real(self, module) / 2), DIFFERS),
    "a slightly wrong scale": ({}, ("scale", lambda real: lambda self, module: real(self, module) * 1.01), DIFFERS),
    "an adapter without effect": ({}, ("scale", lambda real: lambda self, module: 0.0), DIFFERS),
    "swapped layers": ({}, ("take", swapped), DIFFERS),
    "a lost whole module": ({"modules_to_save": ["lm_head"]}, ("fold", forgetful), WHOLE),
}


@pytest.mark.parametrize("damage", FOLDS)
def test_a_wrong_fold_is_noticed_and_the_layer_named(tiny, adapt, tmp_path, monkeypatch, damage):
    lora, (method, wrong), trouble = FOLDS[damage]
    base = tiny("llama", tied=False)
    adapter = adapt([base], target_modules=["q_proj"], **lora)
    merged([base, adapter], tmp_path)  # it is right
    monkeypatch.setattr(Adapter, method, wrong(getattr(Adapter, method)))
    with pytest.raises(StageError, match=refused(trouble.replace("MODULE", Q), adapter)):
        merged([base, adapter], tmp_path)


def test_a_fold_in_the_wrong_orientation_is_noticed(foreign, adapt, tmp_path, monkeypatch):
    """On the square weights of GPT-2's Conv1D nothing else shows it."""
    base = foreign("gpt2")
    adapter = adapt([base], target_modules=["attn.c_proj"])
    merged([base, adapter], tmp_path)
    monkeypatch.setattr(merge, "layout", lambda model: Layout())
    trouble = DIFFERS.replace("MODULE", "transformer.h.0.attn.c_proj")
    with pytest.raises(StageError, match=refused(trouble, adapter)):
        merged([base, adapter], tmp_path)


def test_an_adapter_that_unties_the_head_is_noticed_also_when_the_fold_does_not(tiny, adapt, tmp_path, monkeypatch):
    base = tiny("llama")
    adapter = adapt([base], target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(
        StageError, match=r"^`model\.embed_tokens\.weight` and `lm_head\.weight` are one weight in the "
    ):
        merged([base, adapter], tmp_path)
    real = AdapterChain.steps

    def careless(self, name, weight):
        self.layout, known = Layout(), self.layout
        yield from real(self, name, weight)
        self.layout = known

    monkeypatch.setattr(AdapterChain, "steps", careless)
    trouble = "`lm_head` after the adapter ADAPTER: its weight is not that of the adapter"
    with pytest.raises(StageError, match=refused(trouble, adapter)):
        merged([base, adapter], tmp_path)


def lost(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def added(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def rounded(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()


LACKS = "the model folder `FOLDER` lacks weights, which would be random: `model.layers.1.mlp.up_proj.weight`; " + (
    "fetch it again, or save the whole model again with `save_pretrained`"
)


@pytest.mark.parametrize(
    ("damage", "trouble"),
    [
        (added, "the merged model is not the chain: `lm_head.weight` is not a weight of the base; please report this"),
        (
            rounded,
            "the merged model is not the chain: `model.norm.weight` has another dtype or shape than in the base; "
            "please report this",
        ),
        (lost, LACKS),
    ],
)
def test_a_file_that_is_written_wrong_is_noticed_and_the_weight_named(
    tiny, adapt, tmp_path, monkeypatch, damage, trouble
):
    from safetensors.torch import load_file, save_file

    chain = [tiny("llama")]
    chain.append(adapt(chain, target_modules=["q_proj"]))
    real = shards.write

    def write(weights, change, out, *settings):
        count = real(weights, change, out, *settings)
        written = load_file(out / "model.safetensors")
        damage(written)
        save_file(written, out / "model.safetensors", metadata={"format": "pt"})
        return count

    monkeypatch.setattr(shards, "write", write)
    with pytest.raises(StageError) as caught:
        merged(chain, tmp_path)
    assert str(caught.value) == trouble.replace("FOLDER", str(tmp_path))


def test_a_base_that_lacks_a_weight_is_refused(tiny, adapt, tmp_path):
    from safetensors.torch import load_file, save_file

    base, out = shutil.copytree(tiny("llama"), tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    weights = load_file(base / "model.safetensors")
    lost(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError) as caught:
        merged([base, adapt([tiny("llama")], target_modules=["q_proj"])], out)
    assert str(caught.value) == LACKS.replace("FOLDER", str(base))


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"target_modules": ["wte", "attn.c_proj"], "use_dora": True}])
def test_gpt2_is_merged_as_it_was_trained(foreign, adapt, tmp_path, lora):
    chain = [foreign("gpt2", tied=False)]
    for seed in range(2):
        chain.append(adapt(chain, seed, **lora))
    metrics = merged(chain, tmp_path)
    expected = trained(chain)
    assert (served(tmp_path) - expected).abs().max() <= 1e-4
    assert (served(chain[0]) - expected).abs().max() > 0.01
    assert metrics["layers"] == 2 * (8 if "target_modules" not in lora else 3)


def test_a_mixture_of_experts_is_merged(foreign, adapt, tmp_path):
    """Its files have a weight for each expert, which transformers puts together when it loads them."""
    base = foreign("qwen3_moe", tied=False)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in read_facts(base).weights
    chain = [base, adapt([base], target_modules=["q_proj", "o_proj"])]
    assert merged(chain, tmp_path)["layers"] == 4
    assert (served(tmp_path) - trained(chain)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bits_are_those_of_peft(tiny, adapt, tmp_path, dtype):
    """One adapter, so that PEFT rounds once as well."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=dtype).save_pretrained(base)
    adapter = adapt([tiny("qwen2")])
    out = tmp_path / "out"
    out.mkdir()
    merged([base, adapter], out)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, weight in load_model([str(out)], dtype="auto").state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert weight.equal(expected[name]), name


def halved(folder, out):
    """A model folder in bfloat16, as those on the Hub are."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, out)
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(out)
    return out


def test_in_bfloat16_the_stage_after_starts_from_the_merged_bits(tiny, adapt, tmp_path):
    import torch

    chain = [halved(tiny("llama"), tmp_path / "base")]
    chain += [adapt(chain, 1), adapt(chain, 2)]
    (tmp_path / "whole").mkdir()
    assert merged(chain, tmp_path / "whole")["layer_difference"] <= 1e-5
    started = load_model(list(map(str, chain)), dtype="float32").state_dict()
    written = load_model([str(tmp_path / "whole")], dtype="auto").state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in written.values())
    assert all(torch.equal(started[name], weight.float()) for name, weight in written.items())
