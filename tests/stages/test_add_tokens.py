"""New tokens have rows of their own, in both embeddings, from the stage that adds them to the merged model."""

import json
import shutil

import pytest

from stages import add_tokens, dpo, kto, merge, pt, reward, sft
from stages.model.facts import read_facts
from stages.model.folder import load_model, load_tokenizer
from stages.model.inputs import Inputs
from stages.model.tokens import NEW_ROWS, ids
from stages.runtime.errors import Interrupted

pytestmark = pytest.mark.train

NEW = ["<|think|>", "<|done|>"]
TEMPLATE = "{%- for message in messages -%}{{- '<|think|>' + message['content'] + '<|done|>' -}}{%- endfor -%}"


def add(folder, out, *, special=(), words=()):
    out.mkdir(exist_ok=True)
    config = add_tokens.Config(model="m", special=list(special), words=list(words))
    return add_tokens.run(config, Inputs(model=[str(folder)]), out), out


@pytest.fixture(scope="module")
def extended(tiny, tmp_path_factory):
    """The folder of a model with two new special tokens, made once a kind."""
    made = {}

    def model(architecture, *, tied=True):
        key = (architecture, tied)
        if key not in made:
            out = tmp_path_factory.mktemp("add_tokens")
            made[key] = add(tiny(architecture, tied=tied), out, special=NEW)[1]
        return made[key]

    return model


@pytest.mark.parametrize("architecture", ["llama", "bloom", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_are_the_mean_of_the_old_ones_and_old_rows_stay(tiny, tmp_path, architecture, tied):
    import torch

    metrics, out = add(tiny(architecture, tied=tied), tmp_path / "out", special=NEW[:1], words=["幽门螺杆菌"])
    before, after = load_model([str(tiny(architecture, tied=tied))]), load_model([str(out)])
    rows = before.get_input_embeddings().weight.shape[0]
    assert metrics == {"new_tokens": 2, "new_rows": 2, "rows": rows + 2, "ids": {NEW[0]: rows, "幽门螺杆菌": rows + 1}}
    assert after.config.vocab_size == rows + 2
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(after, name)().weight
        assert torch.equal(new[:rows], old)
        assert torch.allclose(new[rows:], old.mean(0).expand(2, -1), atol=1e-7)
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) is tied
    others = [name for name in before.state_dict() if "embed" not in name and "lm_head" not in name]
    assert all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in others)
    tokenizer = load_tokenizer([str(out)])
    ids = tokenizer(f"a{NEW[0]}幽门螺杆菌b")["input_ids"]
    assert ids.count(rows) == ids.count(rows + 1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a幽门螺杆菌b"
    assert tokenizer.chat_template == load_tokenizer([str(tiny(architecture, tied=tied))]).chat_template


def test_the_same_tokens_give_the_same_bytes(tiny, tmp_path):
    for name in ("one", "two"):
        add(tiny("llama"), tmp_path / name, special=NEW)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert NEW_ROWS in files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_a_known_token_keeps_its_id_and_is_named(tiny, tmp_path):
    metrics, out = add(tiny("llama"), tmp_path / "out", special=["<|im_end|>", NEW[0]])
    before = load_tokenizer([str(tiny("llama"))])
    assert metrics["new_tokens"] == 1
    after = load_tokenizer([str(out)])
    assert len(after) == len(before) + 1
    assert after.convert_tokens_to_ids("<|im_end|>") == before.convert_tokens_to_ids("<|im_end|>")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["text"] for event in events] == ["in the tokenizer already: `<|im_end|>`"]


def test_known_tokens_alone_change_no_weight_and_leave_no_rows_to_train(tiny, tmp_path):
    metrics, out = add(tiny("llama"), tmp_path / "out", special=["<|im_end|>"])
    assert (metrics["new_tokens"], metrics["new_rows"]) == (0, 0)
    assert (out / "model.safetensors").read_bytes() == (tiny("llama") / "model.safetensors").read_bytes()
    assert not (out / NEW_ROWS).exists()


def test_tokens_that_were_added_without_rows_get_rows(tiny, tmp_path):
    import torch

    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    tokenizer = load_tokenizer([str(folder)])
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.save_pretrained(folder)
    metrics, out = add(folder, tmp_path / "out", special=NEW[:1])
    assert (metrics["new_tokens"], metrics["new_rows"]) == (0, 2)
    old = load_model([str(tiny("llama"))]).get_input_embeddings().weight
    new = load_model([str(out)]).get_input_embeddings().weight
    assert torch.allclose(new[len(old) :], old.mean(0).expand(2, -1), atol=1e-7)


def test_a_row_that_no_token_used_becomes_the_mean_of_those_that_are_used(tiny, tmp_path):
    """Models on the Hub have more rows than tokens; what is in the others was never trained."""
    import torch

    folder = shutil.copytree(tiny("llama", tied=False), tmp_path / "model")
    model = load_model([str(folder)])
    used = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(used + 64, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[used:] = 100.0
    model.save_pretrained(folder)
    metrics, out = add(folder, tmp_path / "out", special=NEW)
    assert (metrics["rows"], metrics["new_rows"]) == (used + 64, 2)
    loaded = load_model([str(out)])
    for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert torch.allclose(layer.weight[used : used + 2], layer.weight[:used].mean(0).expand(2, -1), atol=1e-7)
        assert (layer.weight[used + 2 :] == 100).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_lora_trains_the_new_rows_alone_and_merge_folds_them(extended, train, rows, tmp_path, architecture, tied):
    import torch

    base = extended(architecture, tied=tied)
    first = train(pt, [base], rows("text", 8)).out
    second = train(sft, [base, first], rows("alpaca", 8), template=TEMPLATE).out
    out = tmp_path / "merged"
    out.mkdir()
    chain = [str(base), str(first), str(second)]
    metrics = merge.run(merge.Config(model="chain"), Inputs(model=chain), out)
    assert metrics["adapters"] == 2
    before, after = load_model([str(base)]), load_model([str(out)])
    size = before.get_input_embeddings().weight.shape[0]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        changed = (getattr(before, name)().weight != getattr(after, name)().weight).any(1).nonzero().flatten()
        assert changed.tolist() == [size - 2, size - 1]
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) is tied
    ids = torch.tensor([[5, size - 2, 7, size - 1]])
    with torch.no_grad():
        assert torch.allclose(after(ids).logits, load_model(chain)(ids).logits, atol=1e-5)
    assert not (out / NEW_ROWS).exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stage", [dpo, kto], ids=["dpo", "kto"])
def test_the_reference_of_preference_training_has_the_rows_that_it_started_with(
    extended, train, rows, at, stage, tied, tmp_path
):
    import torch

    base = extended("llama", tied=tied)
    seen = {}

    def look(model):
        ids = torch.tensor([[5, len(load_tokenizer([str(base)])) - 1, 7]])
        with torch.no_grad(), model.disable_adapter():
            seen["reference"] = model(ids).logits
        with torch.no_grad():
            seen["policy"] = model(ids).logits
        seen["start"] = load_model([str(base)])(ids).logits

    data = rows("preference", 8)
    if stage is kto:
        lines = [
            {"prompt": "感冒了怎么办？", "completion": text, "label": label}
            for text, label in (("多喝水。<|done|>", True), ("不知道。", False)) * 4
        ]
        file = tmp_path / "labelled.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        data = type(data)(path=str(file), format="labelled")
    made = train(stage, [base], data, callback=at(3, "on_step_end", look))
    assert torch.allclose(seen["reference"], seen["start"], atol=1e-6)
    assert not torch.allclose(seen["policy"], seen["start"], atol=1e-4)
    config = json.loads((made.out / "adapter_config.json").read_text(encoding="utf-8"))
    modules = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert sorted(config["trainable_token_indices"], reverse=True) == modules


def test_a_stopped_run_goes_on_with_the_same_rows(extended, train, rows, at, stop, tmp_path):
    base = extended("llama", tied=False)
    settings = {"template": TEMPLATE, "trainer": {"save_strategy": "steps"}}
    whole = train(sft, [base], rows("alpaca", 8), **settings).out
    with pytest.raises(Interrupted):
        train(sft, [base], rows("alpaca", 8), out=tmp_path, callback=at(2, "on_step_end", stop), **settings)
    train(sft, [base], rows("alpaca", 8), out=tmp_path, **settings)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_reward_model_has_the_trained_rows(extended, train, rows):
    from safetensors.torch import load_file

    base = extended("llama", tied=False)
    made = train(reward, [base], rows("preference", 8), template=TEMPLATE)
    name = "model.embed_tokens.weight"
    after, before = load_file(made.out / "model.safetensors")[name], load_file(base / "model.safetensors")[name]
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == [len(before) - 2, len(before) - 1]


@pytest.mark.parametrize(
    ("lora", "trained"),
    [
        ({"trainable_token_indices": None}, None),
        ({"trainable_token_indices": [3]}, [3]),
        ({"modules_to_save": ["embed_tokens"]}, {"lm_head": [600, 601]}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
    ],
    ids=str,
)
def test_what_lora_says_of_the_embeddings_stands(extended, rows, lora, trained):
    from stages.training import loop

    base = extended("llama", tied=False)
    config = sft.Config(model="m", data=[rows("alpaca", 1)], lora={"r": 2, **lora})
    made = loop.adapter(config, Inputs(model=[str(base)]))
    assert made.trainable_token_indices == trained


def test_what_the_plan_expects_is_what_the_stage_leaves(tiny, tmp_path):
    config = add_tokens.Config(model="m", special=NEW)
    for tied in (True, False):
        _, out = add(tiny("llama", tied=tied), tmp_path / str(tied), special=NEW)
        expected, found = add_tokens.facts(config, read_facts(tiny("llama", tied=tied))), read_facts(out)
        assert expected.weights == found.weights
        assert expected.stored == found.stored
        assert expected.config["vocab_size"] == found.config["vocab_size"]
        assert all(expected.has_token(token) and found.has_token(token) for token in NEW)


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "[PAD]"},
        {"pad_token": {"content": "[PAD]", "special": True, "__type": "AddedToken"}},
        {"additional_special_tokens": ["<x>", "<y>"], "cls_token": "[CLS]"},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"added_tokens_decoder": {"900": {"content": "<far>", "special": True}}},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_ids_are_those_of_the_loaded_tokenizer(tiny, tmp_path, settings):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    expected = load_tokenizer([str(folder)]).get_vocab()
    assert ids(read_facts(folder)) == expected
    assert len(expected) > len(load_tokenizer([str(tiny("llama"))]))


OTHERS = {
    "gpt2": ({"n_layer": 1, "n_head": 2, "n_embd": 16}, ["transformer.wte"]),
    "opt": ({"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}, ["model.decoder.embed_tokens"]),
    "gpt_neox": (
        {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        ["gpt_neox.embed_in", "lm_head"],
    ),
    "phi": ({"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}, ["model.embed_tokens"]),
    "gemma3_text": (
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "head_dim": 8,
        },
        ["model.embed_tokens"],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_name_their_embeddings_otherwise(tiny, adapt, tmp_path, kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, modules = OTHERS[kind]
    folder, out = shutil.copytree(tiny("llama"), tmp_path / "model"), tmp_path / "out"
    tokenizer = load_tokenizer([str(folder)])
    if "n_embd" not in sizes:
        sizes = {**sizes, "hidden_size": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=3, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    add(folder, out, special=NEW)
    written = json.loads((out / NEW_ROWS).read_text(encoding="utf-8"))
    assert written == {"modules": modules, "ids": [len(tokenizer), len(tokenizer) + 1]}
    before, after = load_model([str(folder)]), load_model([str(out)])
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)(), getattr(after, name)()
        assert torch.allclose(new.weight[-2:], old.weight.mean(0).expand(2, -1), atol=1e-6)
        if getattr(old, "bias", None) is not None:
            assert torch.allclose(new.bias[-2:], old.bias.mean().expand(2), atol=1e-6)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(after(ids).logits[..., :-2], before(ids).logits, atol=1e-6)
    expected = add_tokens.facts(add_tokens.Config(model="m", special=NEW), read_facts(folder))
    assert expected.weights == read_facts(out).weights
    adapter = adapt([out], trainable_token_indices=dict.fromkeys(modules, written["ids"]))
    merged = tmp_path / "merged"
    merged.mkdir()
    chain = [str(out), str(adapter)]
    merge.run(merge.Config(model="chain"), Inputs(model=chain), merged)
    with torch.no_grad():
        assert torch.allclose(load_model([str(merged)])(ids).logits, load_model(chain)(ids).logits, atol=1e-5)
