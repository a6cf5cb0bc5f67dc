"""Adapters are folded as PEFT applies them: on every architecture, of every kind, one after another."""

import json
import shutil

import pytest

from stages import pt, sft
from stages.model.facts import Facts, read_facts
from stages.model.folder import load_model
from stages.model.lora import Adapter
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"down_proj": 5}},
    "DoRA": {"use_dora": True},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "rows of tokens": {"trainable_token_indices": {"embed_tokens": [3, 599], "lm_head": [599, 3, 7]}},
}


CONV1D = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"c_proj": 2}},
    {"bias": "all"},
    {"lora_bias": True},
    {"target_modules": ["attn.c_proj", "lm_head"]},  # PEFT then writes `fan_in_fan_out: false` for both
    {"target_modules": ["attn.c_proj", "lm_head", "wte"], "use_dora": True},
]


def same(folded, expected):
    """In float32 the fold has the bits of PEFT's own."""
    assert folded.keys() == expected.keys()
    for name, weight in folded.items():
        assert weight.equal(expected[name]), name


def as_peft_merges(chain):
    from peft import PeftModel

    merged = load_model([str(chain[0])])
    for adapter in chain[1:]:
        merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_folding_is_what_peft_merges(tiny, adapt, kind):
    from peft import PeftModel

    base = tiny("llama", tied=False)
    adapter = adapt([base], **KINDS[kind])
    merged = PeftModel.from_pretrained(load_model([str(base)]), adapter).merge_and_unload()
    same(load_model([str(base), str(adapter)]).state_dict(), merged.state_dict())


@pytest.mark.parametrize("kind", ["plain", "DoRA", "whole modules", "rows of tokens"])
def test_adapters_are_folded_in_their_order(tiny, adapt, kind):
    from peft import PeftModel

    base = tiny("llama", tied=False)
    first = adapt([base], seed=1, **KINDS[kind])
    second = adapt([base, first], seed=2, **KINDS[kind])
    merged = load_model([str(base)])
    for adapter in (first, second):
        merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    same(load_model([str(base), str(first), str(second)]).state_dict(), merged.state_dict())


@pytest.mark.parametrize("lora", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_biases_that_were_trained_are_folded(tiny, adapt, lora):
    from peft import PeftModel

    base = tiny("bloom")
    adapter = adapt([base], **lora)
    merged = PeftModel.from_pretrained(load_model([str(base)]), adapter).merge_and_unload()
    same(load_model([str(base), str(adapter)]).state_dict(), merged.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_rows_of_tokens_are_folded_into_both_sides_of_a_tied_embedding(tiny, adapt, architecture):
    from peft import PeftModel

    base = tiny(architecture, tied=True)
    adapter = adapt([base], trainable_token_indices=[599, 3])
    merged = PeftModel.from_pretrained(load_model([str(base)]), adapter).merge_and_unload()
    folded = load_model([str(base), str(adapter)])
    same(folded.state_dict(), merged.state_dict())
    changed = (folded.get_output_embeddings().weight != load_model([str(base)]).get_output_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 599]


@pytest.mark.parametrize("lora", CONV1D, ids=str)
def test_gpt2_whose_weights_are_inputs_by_outputs_is_folded(foreign, adapt, lora):
    import torch

    chain = [foreign("gpt2", tied=False)]
    for seed in range(2):
        chain.append(adapt(chain, seed, **lora))
    folded = load_model(list(map(str, chain)))
    same(folded.state_dict(), as_peft_merges(chain).state_dict())
    ids = torch.arange(64)[None]
    with torch.no_grad():
        change = (folded(input_ids=ids).logits - load_model([str(chain[0])])(input_ids=ids).logits).abs().max()
    assert change > 0.01


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    ],
    ids=str,
)
def test_an_adapter_on_one_side_of_a_tied_embedding_is_refused_and_on_both_it_is_folded(tiny, adapt, lora):
    import torch

    base = tiny("llama")
    one, both = adapt([base], **lora), adapt([base], **lora, ensure_weight_tying=True)
    with pytest.raises(StageError) as caught:
        load_model([str(base), str(one)])
    assert str(caught.value) == (
        f"`model.embed_tokens.weight` and `lm_head.weight` are one weight in the base, and the adapter `{one}` changes "
        "only one of them, or each in its own way; train it again without the embeddings"
    )
    folded = load_model([str(base), str(both)])
    ids = torch.arange(64)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (folded, trained(both), load_model([str(base)]))]
    assert folded.lm_head.weight is folded.get_input_embeddings().weight
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert (logits[0] - logits[2]).abs().max() > 0.01


def trained(adapter):
    """The base of an adapter under PEFT, as it was trained."""
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(adapter).eval()


def test_a_fresh_adapter_changes_nothing(tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    base = str(tiny("qwen2"))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load_model([base]), config).save_pretrained(tmp_path)
    for name, weight in load_model([base, str(tmp_path)]).state_dict().items():
        assert torch.equal(weight, load_model([base]).state_dict()[name])


def test_an_adapter_of_another_model_is_refused(tiny, adapt):
    adapter = adapt([tiny("llama")], target_modules=["q_proj", "up_proj"])
    with pytest.raises(StageError) as caught:
        load_model([str(tiny("bloom")), str(adapter)])
    assert str(caught.value) == (
        f"8 tensors of the adapter `{adapter}` have no place in the base (first "
        "`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`): it was trained on another model, or its kind "
        "cannot be folded"
    )


def test_an_adapter_of_another_size_is_refused(tiny, adapt, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny("llama"))
    config.intermediate_size *= 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    adapter = adapt([tiny("llama")])
    with pytest.raises(StageError) as caught:
        load_model([str(tmp_path), str(adapter)])
    assert str(caught.value) == (
        f"for the adapter `{adapter}`, `model.layers.0.mlp.gate_proj.weight` is 128 × 64 and not 256 × 64 as in the "
        "base: it was trained on another model"
    )


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("layer_replication", [[0, 2], [1, 2]], "layer_replication: [[0, 2], [1, 2]]"),
        ("use_a_thing_of_next_year", True, "use_a_thing_of_next_year: true"),
        ("init_lora_weights", "pissa_niter_4", 'init_lora_weights: "pissa_niter_4"'),
    ],
)
def test_an_adapter_whose_kind_the_fold_does_not_know_is_refused_by_name(tiny, adapt, tmp_path, name, value, shown):
    base = tiny("llama")
    adapter = shutil.copytree(adapt([base]), tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), name: value}), "utf-8")
    with pytest.raises(StageError) as caught:
        load_model([str(base), str(adapter)])
    assert str(caught.value) == (
        f"the adapter `{adapter}` was trained with `{shown}`, and cannot be folded into its base; train it again "
        "without"
    )


def test_an_adapter_that_is_cut_off_is_refused(tiny, adapt, tmp_path):
    adapter = shutil.copytree(adapt([tiny("llama")]), tmp_path / "torn")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(StageError, match=rf"^the adapter `{adapter}` cannot be read \(.+\)$"):
        Adapter(str(adapter))


def test_kinds_that_could_not_be_folded_are_refused_before_training(tiny, rows):
    def problems(lora, **kind):
        facts = read_facts(tiny("llama", **kind), "the base")
        return sft.check_model(sft.Config(model="base", data=[rows("alpaca", 1)], lora=lora), facts)

    advice = "later stages could not fold the adapter into its base; remove it"
    assert problems({"init_lora_weights": "pissa_niter_4", "use_qalora": True, "r": 4}) == [
        ("lora.use_qalora", f"with `use_qalora` {advice}"),
        ("lora.init_lora_weights", f"`pissa_niter_4` also changes the base, so {advice}"),
    ]
    copies = {"modules_to_save": ["norm", "lm_head"]}
    assert problems(copies, tied=False) == []
    assert problems(copies) == [
        (
            "lora.modules_to_save",
            "input and output embeddings of the base are one weight, and `lm_head` would train a copy; " + advice,
        )
    ]
    both = "input and output embeddings of the base are one weight, and an adapter on `model.embed_tokens` would"
    for targets in (".*(embed_tokens|q_proj)", ["q_proj", "embed_tokens"]):
        told = ("lora.target_modules", f"{both} change both when it is folded; leave it out")
        assert told in problems({"target_modules": targets})
        assert told not in problems({"target_modules": targets}, tied=False)
    ids = {"trainable_token_indices": {"model.embed_tokens": [1], "lm_head": [2]}}
    assert problems(ids, tied=False) == []
    assert problems(ids) == [
        (
            "lora.trainable_token_indices",
            "input and output embeddings of the base are one weight, and `lm_head` has ids of its own; write one list "
            "of ids",
        )
    ]
    for start in (True, "gaussian", "orthogonal"):
        assert problems({"init_lora_weights": start, "use_qalora": False, "use_dora": True}) == []


@pytest.mark.parametrize(
    ("lora", "place"),
    [
        ({"r": 4}, "lora"),
        ({"target_modules": "all-linear"}, "lora"),
        ({"target_modules": ["q_proj", "gate_proj"]}, "lora.target_modules"),
        ({"target_modules": r".*\.(q_proj|gate)"}, "lora.target_modules"),
        ({"target_modules": ["q_proj", "v_proj"]}, None),
        ({"target_modules": r".*self_attn\..*_proj"}, None),
    ],
)
def test_an_adapter_on_experts_is_refused_before_training(rows, lora, place):
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate"]
    names += [f"mlp.experts.{number}.{name}_proj" for number in (0, 1) for name in ("gate", "up", "down")]
    weights = {f"model.layers.0.{name}.weight": (8, 8) for name in names} | {"lm_head.weight": (9, 8)}
    facts = Facts("the base", {"model_type": "qwen3_moe", "num_experts": 2}, weights, tokenizer={"eos_token": "</s>"})
    config = pt.Config(model="base", data=[rows("text", 1)], lora=lora, trainer={"packing": False})
    told = (
        "an adapter on experts or their router cannot be folded into the base; write `target_modules: [k_proj, o_proj, "
        "q_proj, v_proj]`, or remove `lora` to train all weights"
    )
    assert pt.check_model(config, facts) == ([] if place is None else [(place, told)])
    misspelt = pt.check_model(config.model_copy(update={"lora": {"target_modules": ["q_prj"]}}), facts)
    assert [text.partition(";")[0] for _, text in misspelt] == ["`q_prj` matches no linear layer of the base"]


@pytest.mark.parametrize(
    "weights",
    [
        {"gpt_neox.embed_in.weight": (9, 8), "embed_out.weight": (9, 8)},  # not tied
        {"transformer.word_embeddings_layernorm.weight": (8,)},
        {"model.decoder.embed_positions.weight": (9, 8)},
    ],
)
def test_what_is_not_a_tied_embedding_is_let_through(rows, weights):
    facts = Facts("the base", {}, {**weights, "h.0.dense.weight": (8, 8)}, tokenizer={"eos_token": "</s>"})
    config = pt.Config(model="b", data=[rows("text", 1)], lora={"target_modules": ".*"}, trainer={"packing": False})
    assert pt.check_model(config, facts) == []


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_is_folded_as_it_was_trained(tiny, train, rows, start):
    import torch

    base = tiny("qwen3")
    lora = {"r": 4, "init_lora_weights": start, "use_dora": start is True}
    done = train(sft, [base], rows("alpaca", 4), lora=lora, trainer={"max_steps": 2})
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = done.trainer.model.eval()(input_ids=ids).logits
        folded = load_model([str(base), str(done.out)])(input_ids=ids).logits
        assert (folded - expected).abs().max() <= 1e-5
        assert (load_model([str(base)])(input_ids=ids).logits - expected).abs().max() > 1e-3
