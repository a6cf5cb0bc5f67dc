"""More than 5 % of rows that lose their end are known in the plan, from the tokenizer's own files."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"


@pytest.fixture
def base(project):
    """The top of a config with a model whose tokenizer makes one token of a letter, and rows of 30 letters."""
    project.model(template=TEMPLATE)
    letters = {letter: number for number, letter in enumerate(["<unk>", "</s>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save("m/tokenizer.json")
    rows = [{"instruction": "a" * 10, "output": "b" * (30 if number < 30 else 2)} for number in range(100)]
    project.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": "a" * 10, "chosen": "b", "rejected": "c" * 30}] * 20
    project.write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    data = "data:\n  rows: {path: rows.jsonl, format: alpaca}\n  pairs: {path: pairs.jsonl, format: preference}\n"
    return "model: m\n" + data + "stages:\n"


def notes(project, text):
    code, said = project.validate(text)
    assert code == 0, said
    return [line for line in said.splitlines() if "max_length" in line]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("sft: {data: rows, trainer: {max_length: 25}}", "30 of the first 100 rows of `rows`"),
        ("dpo: {data: pairs, trainer: {max_length: 25}}", "20 of the first 20 rows of `pairs`"),
    ],
)
def test_rows_that_lose_their_end_are_a_note(project, base, stage, said):
    name = stage.partition(":")[0]
    assert notes(project, f"{base}  {stage}\n") == [
        f"note: stage `{name}`: {said} are longer than `max_length` 25 and lose their end, so the model would not "
        "learn to stop after them; raise `max_length`"
    ]


@pytest.mark.parametrize("stage", ["sft: {data: rows, trainer: {max_length: 64}}", "sft: {data: rows}"])
def test_rows_that_fit_are_none(project, base, stage):
    assert notes(project, f"{base}  {stage}\n") == []
