"""What a plan knows of models before anything is loaded: tokens without rows, new tokens, adapters, other files."""

import json
from pathlib import Path

from planned import TOP

from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan

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
