"""What a plan knows of models before anything is loaded: tokens without rows, new tokens, adapters, other files."""

import json
import shutil
from pathlib import Path

import pytest
from planned import TOP

from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan
from stages.model import quantized

EMBEDDING = {"model.embed_tokens.weight": [4, 8], "model.layers.0.self_attn.q_proj.weight": [8, 8]}
SFT = "  sft: {data: consult, lora: {r: 8}}\n"


def planned(project, text):
    project.write("x.yaml", text)
    return build_plan(load_config(Path("x.yaml")), Path("saves"))


def tokenizer(project, *tokens, folder="m", **settings):
    """A tokenizer with these tokens in the order of their ids, the last two of them added later."""
    project.write(
        f"{folder}/tokenizer.json",
        json.dumps(
            {
                "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens[:-2])}},
                "added_tokens": [
                    {"id": number + len(tokens) - 2, "content": token} for number, token in enumerate(tokens[-2:])
                ],
            }
        ),
    )
    if settings:
        project.write(f"{folder}/tokenizer_config.json", json.dumps(settings))


# Tokens without a row


def test_tokens_without_a_row_are_told_with_the_way_out(project):
    text = project.model(weights=EMBEDDING) + SFT + "  dpo: {data: prefer}\n"
    tokenizer(project, "</s>", "a", "b", "<|x|>", "<|y|>")
    told = planned(project, text).problems
    assert told == [
        'x.yaml:1:8: stage `sft`: the embedding of `m` has 4 rows, and 1 token of its tokenizer has none ("<|y|>"); '
        'write `add_tokens: ["<|y|>"]` at the top, which gives every token a row, or name a model with its own '
        "tokenizer"
    ]
    assert planned(project, 'add_tokens: ["<|y|>"]\n' + text).problems == []


def test_a_pad_token_that_transformers_would_add_is_one_of_them(project):
    """`pad_token` in tokenizer_config.json alone: transformers gives it the next id when it loads the tokenizer."""
    text = project.model(weights=EMBEDDING) + SFT
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>", pad_token="[PAD]")
    assert [problem.partition("tokenizer has none ")[2][:9] for problem in planned(project, text).problems] == [
        '("[PAD]")'
    ]
    tokenizer(project, "</s>", "a", "[PAD]", "c")
    assert planned(project, text).problems == []


def test_a_placeholder_for_images_needs_no_row(project):
    """Gemma 3 without images has one token more than rows; text never holds it."""
    text = project.model(weights=EMBEDDING) + SFT
    tokenizer(project, "</s>", "a", "b", "c", "<image_soft_token>", eos_token="</s>")
    assert planned(project, text).problems == []


def test_a_list_of_pieces_is_read_and_many_tokens_are_counted(project):
    text = project.model(weights=EMBEDDING) + SFT
    pieces = [[f"w{number}", 0.0] for number in range(10)]
    added = [{"id": 0, "content": "</s>"}]
    project.write("m/tokenizer.json", json.dumps({"model": {"vocab": pieces}, "added_tokens": added}))
    (problem,) = planned(project, text).problems
    assert (
        'has 4 rows, and 6 tokens of its tokenizer have none ("w4", "w5", "w6" and 3 more); write `add_tokens: '
        in problem
    )


def test_where_weights_have_no_embedding_the_vocabulary_of_the_config_counts(project):
    text = project.model(vocab_size=4) + SFT
    tokenizer(project, "</s>", "a", "b", "<|x|>", "<|y|>")
    assert "the embedding of `m` has 4 rows, and 1 token" in planned(project, text).problems[0]


# New tokens


TOKENS = 'add_tokens: ["<|x|>", "<|im_start|>", "<|im_end|>"]\n'


def test_new_tokens_are_a_stage_before_all_others(project):
    text = TOKENS + project.model(weights=EMBEDDING) + SFT + "  dpo: {data: prefer, model: $sft}\n  merge:\n"
    text = text.replace("template: med", "template: chatml")
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>")
    plan = planned(project, text)
    assert plan.problems == []
    names = [step.name for step in plan.steps]
    assert names == ["add_tokens", "sft", "dpo", "merge"]
    first, second = plan.steps[:2]
    assert first.inputs.model == ["m"]
    assert second.inputs.model == [str(first.folder)]
    assert first.recipe == {"special": ["<|x|>", "<|im_start|>", "<|im_end|>"], "words": []}
    assert plan.tokenizer_folder(first) == Path("m")
    assert plan.tokenizer_folder(second) is None  # the tokenizer of `m` lacks the tokens
    assert planned(project, text.replace('["<|x|>", ', "[")).steps[1].fingerprint != second.fingerprint


def test_without_new_tokens_the_template_names_them_as_the_way(project):
    text = project.model(weights=EMBEDDING).replace("template: med", "template: chatml") + SFT
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>")
    (problem,) = planned(project, text).problems
    assert 'add_tokens: ["<|im_end|>", "<|im_start|>"]' in problem


def test_known_tokens_are_a_note(project):
    text = 'add_tokens: {special: ["</s>"], words: [高血压]}\n' + project.model(weights=EMBEDDING) + SFT
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>")
    plan = planned(project, text)
    assert (plan.problems, plan.notes) == (
        [],
        ["stage `add_tokens`: the tokenizer of `m` has `</s>` already; nothing is added for it"],
    )


def test_new_tokens_come_after_a_stage_that_makes_a_model(project):
    text = 'add_tokens: ["<|x|>"]\n' + TOP + "stages:\n  init: {architecture: bloom, data: books}\n" + SFT
    steps = planned(project, text).steps
    assert [(step.name, [Path(folder).name for folder in step.inputs.model]) for step in steps] == [
        ("init", []),
        ("add_tokens", [steps[0].folder.name]),
        ("sft", [steps[1].folder.name]),
    ]
    # The tokenizer that `init` trains lacks the marks of the template.
    assert [step.entry.template is None for step in steps] == [True, True, False]


def test_what_is_compared_has_the_new_tokens(project):
    text = TOKENS + project.model(weights=EMBEDDING) + SFT + "  evaluate: {data: consult}\n"
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>")
    plan = planned(project, text.replace("template: med", "template: chatml"))
    assert plan.problems == []
    assert list(plan.steps[-1].inputs.compared) == ["base", "sft"]
    assert plan.steps[-1].inputs.compared["base"] == [str(plan.steps[0].folder)]
    inside = text.replace("lora: {r: 8}}\n  evaluate: {data: consult}", "lora: {r: 8}, evaluate: consult}")
    assert list(planned(project, inside).steps[-1].inputs.compared) == ["add_tokens", "sft"]


def test_mistakes_in_new_tokens_name_their_place(project):
    top = project.model(weights=EMBEDDING)
    for written, told in (
        (
            "add_tokens: []",
            '1:1: stage `add_tokens`: no token is named; write `special: ["<|im_start|>", "<|im_end|>"]`',
        ),
        ("add_tokens: [a, a]", "1:1: stage `add_tokens`: `a` is here twice; write it once"),
        (
            'add_tokens: ["a", " "]',
            "1:1: stage `add_tokens`: a token is blank; write one with a visible character, or remove it",
        ),
        (
            "add_tokens: {tokens: [a]}",
            "1:14: stage `add_tokens` has no setting `tokens`; there is `model`, `special`, `words`",
        ),
    ):
        code, shown = project.validate(f"{written}\n{top}{SFT}")
        assert (code, shown.splitlines()[0]) == (2, f"x.yaml:{told}")
    code, shown = project.validate(f"add_tokens: [a]\n{top}  add_tokens: {{special: [b]}}\n{SFT}")
    expected = "x.yaml:1:1: `add_tokens` becomes the stage `add_tokens`, which is here already; remove one of the two"
    assert (code, shown.splitlines()[0]) == (2, expected)


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ("[1, 4]", {}, "the embedding of `m` has 4 rows, and 4 is not the number of one; write ids from 0 to 3"),
        (
            "{embed_tokens: [-1]}",
            {},
            "the embedding of `m` has 4 rows, and -1 is not the number of one; write ids from 0 to 3",
        ),
        (
            "{embed_tokens: [1], lm_head: [1]}",
            {"lm_head.weight": [4, 8], "lm_head.bias": [4, 1]},
            "PEFT leaves out the bias of the output embedding of `m` with it; name the input embedding alone",
        ),
        ("[1]", {"lm_head.bias": [4, 1]}, "PEFT leaves out the bias of the output embedding of `m` with it; remove it"),
        ("{embed_tokens: [1]}", {"lm_head.weight": [4, 8], "lm_head.bias": [4, 1]}, None),
        ("{embed_tokens: [1], lm_head: [2]}", {"lm_head.weight": [4, 8]}, None),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(project, rows, more, told):
    text = project.model(weights=EMBEDDING | more) + SFT.replace("r: 8", f"r: 8, trainable_token_indices: {rows}")
    found = planned(project, text).problems
    assert [problem.partition("stage `sft`: ")[2] for problem in found] == ([told] if told else [])


# Adapters


@pytest.fixture
def base(project):
    """The text of a config up to its stages, with the base `m`."""
    text = project.model(weights=EMBEDDING)
    tokenizer(project, "</s>", "a", "b", "c", eos_token="</s>")
    return text


def test_an_adapter_brings_its_base(project, base):
    project.adapter(base_model_name_or_path="m")
    text = base + SFT + "  merge:\n"
    alone = planned(project, text)
    plan = planned(project, text.replace("model: m", "model: a"))
    assert plan.problems == []
    assert [step.inputs.model[:2] for step in plan.steps] == [["m", "a"]] * 2
    assert plan.steps[0].fingerprint != alone.steps[0].fingerprint
    assert (
        sorted(Path(path).parent.name for path in plan.steps[0].files if Path(path).parent.name)
        == ["a"] * 2 + ["m"] * 4
    )
    given = planned(project, text.replace("model: m", "model: [m, a]"))
    assert [step.fingerprint for step in given.steps] == [step.fingerprint for step in plan.steps]
    project.write(
        "a/adapter_config.json", (project.folder / "a/adapter_config.json").read_text().replace('"r": 2', '"r": 1')
    )
    assert planned(project, text.replace("model: m", "model: a")).steps[0].fingerprint != plan.steps[0].fingerprint


def test_adapters_on_adapters_keep_their_order(project, base):
    project.adapter("a", base_model_name_or_path="m")
    project.adapter("b", base_model_name_or_path="a")
    for written in ("b", "[a, b]", "[m, a, b]"):
        plan = planned(project, base.replace("model: m", f"model: {written}") + SFT)
        assert (plan.problems, plan.steps[0].inputs.model) == ([], ["m", "a", "b"])
    assert planned(project, base.replace("model: m", "model: [m, b, a]") + SFT).steps[0].inputs.model == ["m", "b", "a"]


def test_the_adapter_of_a_finished_stage_brings_the_chain_of_its_record(project):
    steps = project.plan()
    for name in ("init", "pt", "sft"):
        folder = steps[name].folder
        shutil.copytree(made(project, name), folder)
        record = {"schema": 1, "files": {}, "model": steps[name].produces}
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    text = f"model: {steps['sft'].folder}\n{TOP}stages:\n{SFT}"
    plan = planned(project, text)
    assert plan.problems == []
    assert plan.steps[0].inputs.model == steps["sft"].produces


def made(project, name):
    """A folder as a stage leaves it: a model for `init`, an adapter for the others."""
    if name == "init":
        project.model(name, weights=EMBEDDING)
    else:
        project.adapter(name, base_model_name_or_path="a chain of adapters, see `model` in record.json")
    return project.folder / name


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"base_model_name_or_path": "org/name"},
            "`a` is a LoRA adapter on `org/name`, and does not say on which commit of it; name its base first, with "
            "the "
            "commit (40 hex digits): `model: [org/name@COMMIT, a]`",
        ),
        (
            {"base_model_name_or_path": "/there/was"},
            "`a` is a LoRA adapter on `/there/was`, which is not on this machine; name its base first: `model: "
            "[BASE, a]`",
        ),
        (
            {"base_model_name_or_path": None},
            "`a` is a LoRA adapter, and does not name the model that it was trained on; name its base first: "
            "`model: [BASE, a]`",
        ),
        (
            {"base_model_name_or_path": "m", "peft_type": "IA3"},
            "`a` is an adapter of the kind IA3, and only LoRA can be folded into a base; merge it into its base "
            "with the "
            "tool that made it, and name the merged folder",
        ),
        (
            {"base_model_name_or_path": "org/name", "peft_type": "PREFIX_TUNING"},
            "`a` is an adapter of the kind PREFIX_TUNING, and only LoRA can be folded into a base; merge it into its "
            "base with the tool that made it, and name the merged folder",
        ),
        (
            {"base_model_name_or_path": "m", "use_qalora": True},
            "`a` was trained with `use_qalora: true`, and cannot be folded into its base; merge it into its base "
            "with the "
            "tool that made it, and name the merged folder",
        ),
        (
            {"base_model_name_or_path": "m", "weights": {"model.layers.7.mlp.up_proj.lora_A.weight": [2, 8]}},
            "`model.layers.7.mlp.up_proj.lora_A.weight` of the adapter `a` has no place in `m`: it was trained on "
            "another "
            "model; name that one first: `model: [BASE, a]`",
        ),
        (
            {"base_model_name_or_path": "m", "weights": {"model.layers.0.self_attn.q_proj.lora_A.weight": [2, 9]}},
            "`model.layers.0.self_attn.q_proj.lora_A.weight` of the adapter `a` has the size 2 × 9, and "
            "`model.layers.0.self_attn.q_proj.weight` in `m` 8 × 8: it was trained on another model; name that one "
            "first: `model: [BASE, a]`",
        ),
        (
            {
                "base_model_name_or_path": "m",
                "weights": {"model.embed_tokens.weight": [6, 8], "lm_head.weight": [6, 8]},
            },
            "`model.embed_tokens.weight` of the adapter `a` has the size 6 × 8, and `model.embed_tokens.weight` in `m` "
            "4 × 8: its base had other tokens; merge it into its base with the tool that made it, and name the merged "
            "folder",
        ),
        (
            {"base_model_name_or_path": "m", "weights": {"lm_head.weight": [4, 8]}},
            "the adapter `a` changes the output embedding alone, which is also the other one in `m`, so it cannot be "
            "folded; merge it into its base with the tool that made it, and name the merged folder",
        ),
        ({"base_model_name_or_path": "a"}, "the adapter `a` was trained on itself, as it says; name its base first"),
    ],
    ids=[
        "no commit",
        "gone",
        "no base",
        "kind",
        "kind before the base",
        "setting",
        "no place",
        "size",
        "tokens",
        "tied",
        "circle",
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(project, base, config, told):
    project.adapter(**config)
    assert planned(project, base.replace("model: m", "model: a") + SFT).problems == [f"x.yaml:1:8: stage `sft`: {told}"]


QUANTIZED = {"quantized_base": "nf4", "block_size": 64, "double_quantization": True, "dtype": "float32", "modules": []}


@pytest.mark.parametrize(
    ("content", "there", "told"),
    [
        (QUANTIZED, True, None),
        (
            QUANTIZED,
            False,
            "the adapter `a` was trained on a base in nf4, and cannot be folded without a package; `pip install "
            "bitsandbytes`",
        ),
        (
            {**QUANTIZED, "quantized_base": "fp4"},
            True,
            "`a/quantized_base.json` does not say how the base was quantized in words that are known here; train the "
            "adapter again",
        ),
    ],
)
def test_an_adapter_on_a_quantized_base_needs_bitsandbytes(project, base, monkeypatch, content, there, told):
    monkeypatch.setattr(quantized, "find_spec", lambda name: object() if there else None)
    project.adapter(base_model_name_or_path="m")
    project.write("a/quantized_base.json", json.dumps(content))
    expected = [f"x.yaml:1:8: stage `sft`: {told}"] if told is not None else []
    assert planned(project, base.replace("model: m", "model: a") + SFT).problems == expected


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            "[m, m2]",
            "1:8: stage `sft`: `m2` is not a LoRA adapter; in a list of models only the first is a whole model",
        ),
        ("[m, a, a]", "1:8: stage `sft`: `a` is in the list twice; write it once"),
        (
            "[m, b]",
            "1:8: stage `sft`: the model folder `b` does not exist; name a folder or a Hub model as `org/name@commit`",
        ),
        (
            "[org/name, a]",
            "1:8: `org/name` is not a folder here; for a model on the Hub pin its commit (40 hex digits), as "
            "`org/name@COMMIT`",
        ),
        (
            "[m, 3]",
            '1:8: `model` is `["m", 3]`; it is a folder, `org/name@commit` on the Hub, `$stage`, or a list: a base, '
            "then adapters on it",
        ),
    ],
)
def test_a_list_of_models_is_a_base_and_adapters(project, base, model, told):
    project.adapter()
    project.model("m2")
    code, shown = project.validate(base.replace("model: m", f"model: {model}") + SFT)
    assert (code, shown) == (2, f"x.yaml:{told}\n")


def test_a_stage_is_named_alone(project, base):
    project.adapter()
    code, shown = project.validate(base + SFT + "  dpo: {data: prefer, model: [$sft, a]}\n")
    text = "`$sft` is in a list of folders; write `model: $sft` alone, which has its adapters with it"
    assert (code, shown) == (2, f"x.yaml:9:30: {text}\n")


def test_an_adapter_is_no_scorer(project, base):
    project.adapter(base_model_name_or_path="m")
    text = base + "  select: {data: consult, method: quality, keep: 0.5, scorer: a}\n"
    told = "`a` is a LoRA adapter, and `scorer` is a whole model; merge it and name that"
    assert planned(project, text).problems == [f"x.yaml:8:63: stage `select`: {told}"]


def test_an_adapter_as_a_pickle_is_refused(project, base):
    project.adapter(base_model_name_or_path="m")
    (project.folder / "a/adapter_model.safetensors").rename(project.folder / "a/adapter_model.bin")
    (problem,) = planned(project, base.replace("model: m", "model: a") + SFT).problems
    assert problem == (
        "x.yaml:1:8: stage `sft`: the adapter `a` has no adapter_model.safetensors (`adapter_model.bin` is a "
        "pickle, which "
        "can run code); save it again with PEFT's `save_pretrained`"
    )


# Files that are no folders


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            "m/model.safetensors",
            "`m/model.safetensors` holds weights alone, and a model is a folder: weights, config.json and "
            "tokenizer.json; write `model: m`",
        ),
        (
            "x.safetensors",
            "`x.safetensors` holds weights alone, and a model is a folder: weights, config.json and tokenizer.json; "
            "name "
            "a folder or `org/name@commit`",
        ),
        (
            "x.gguf",
            "`x.gguf` is a model of llama.cpp, which cannot be trained; a model is a folder with .safetensors weights; "
            "name a folder or `org/name@commit`",
        ),
        (
            "x.bin",
            "`x.bin` is a pickle, which can run code; a model is a folder with .safetensors weights; name a folder or "
            "`org/name@commit`",
        ),
        ("x.yaml", "`x.yaml` is a file, and a model is a folder; name a folder or `org/name@commit`"),
        ("a/b.gguf", "the model folder `a/b.gguf` does not exist; name a folder or a Hub model as `org/name@commit`"),
        (
            "deep",
            "the model folder `deep` has no config.json; it is not a transformers model, and `deep/er/m` below it "
            "may be one",
        ),
        (
            "llama",
            "the model folder `llama` has no config.json; it is not a transformers model, and `q.gguf` is a model of "
            "llama.cpp, which cannot be trained; a model is a folder with .safetensors weights",
        ),
    ],
)
def test_what_is_no_model_folder_is_told_what_it_is(project, base, model, told):
    for name in ("x.safetensors", "x.gguf", "x.bin", "llama/q.gguf"):
        project.write(name, b"weights")
    project.model("deep/er/m")
    assert planned(project, base.replace("model: m", f"model: {model}") + SFT).problems == [
        f"x.yaml:1:8: stage `sft`: {told}"
    ]


# Positions


@pytest.mark.parametrize(
    ("model_type", "config", "told"),
    [
        ("gpt2", {"n_positions": 512}, "problem"),
        ("opt", {"max_position_embeddings": 512}, "problem"),
        ("gptj", {"n_positions": 512}, "problem"),
        ("mpt", {"max_seq_len": 512}, "problem"),
        ("llama", {"max_position_embeddings": 512}, "note"),
        ("gpt_neox", {"max_position_embeddings": 512}, "note"),
        ("gemma3", {"text_config": {"max_position_embeddings": 512}}, "note"),
        ("bloom", {"seq_length": 512}, None),
        ("llama", {"max_position_embeddings": 1024}, None),
    ],
)
def test_rows_longer_than_the_positions_of_a_model_are_a_problem_or_a_note(project, model_type, config, told):
    plan = planned(project, project.model(model_type=model_type, **config) + "  sft: {data: consult}\n")
    found = {"problem": plan.problems, "note": plan.notes}
    for kind, texts in found.items():
        assert bool([text for text in texts if "`max_length`" in text and "512 positions" in text]) is (kind == told)


def test_what_init_will_make_has_positions(project):
    text = TOP + "stages:\n  init: {architecture: llama, data: books, max_position_embeddings: 512}\n" + SFT
    (note,) = planned(project, text).notes
    assert "512 positions" in note


def test_rows_without_a_limit_need_positions_without_an_end(project):
    weights = {"model.layers.0.self_attn.q_proj.weight": [16, 16]}
    text = project.model(model_type="opt", max_position_embeddings=512, weights=weights) + SFT
    unlimited = text.replace("lora: {r: 8}", "trainer: {max_length: null}")
    told = "`m` has 512 positions, and `max_length` is not set; write 512"
    assert planned(project, unlimited).problems == [f"x.yaml:8:46: stage `sft`: {told}"]
    calibrated = text.replace("lora: {r: 8}", "trainer: {max_length: 512}")
    calibrated += "  quantize: {group_size: 16, calibration: {data: consult, max_length: 600}}\n"
    told = "the model of `sft` has 512 positions, and `max_length` is 600; write 512"
    assert planned(project, calibrated).problems == [f"x.yaml:9:71: stage `quantize`: {told}"]
