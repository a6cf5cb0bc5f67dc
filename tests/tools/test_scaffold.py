"""`init`: data files are looked into, and the config that is written validates and plans."""

import json

import pytest
import yaml

from pipeline.cli import main

TURNS = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
ROWS = {
    "qa.csv": "科室,问题,回答\n内科,头痛怎么办？,多休息。\n外科,扭伤怎么办？,先冰敷。\n",
    "book.txt": "心脏位于胸腔中。\n\n肝脏位于右上腹。\n",
    "prefer.jsonl": '{"question": "头痛", "chosen": "多休息。", "rejected": "不知道。"}\n' * 30,
    "chat.json": json.dumps([{"conversations": TURNS}] * 30),
    "marked.jsonl": '{"prompt": "头痛", "completion": "多休息。", "label": true}\n' * 30,
    "odd.jsonl": '{"a": 1, "b": 2, "c": 3}\n',
}


@pytest.fixture
def files(project, tmp_path):
    for name, text in ROWS.items():
        (tmp_path / name).write_bytes(text.encode("gb18030" if name == "qa.csv" else "utf-8"))

    def call(*words):
        code = main(list(words))
        shown = project.capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_a_config_for_every_kind_of_data_plans(files, tmp_path):
    data = [word for name in list(ROWS)[:-1] for word in ("--data", name)]
    code, out, err = files("init", "mine.yaml", *data, "--question", "头痛怎么办？")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "qa.csv: `alpaca`, `问题` as `instruction`, `回答` as `output`, gb18030",
        "book.txt: `text`, utf-8",
        "prefer.jsonl: `preference`, `question` as `prompt`, utf-8",
        "chat.json: `sharegpt`, utf-8",
        "marked.jsonl: `labelled`, utf-8",
        "wrote mine.yaml",
        "next: pipeline plan mine.yaml",
    ]
    code, out, err = files("plan", "mine.yaml", "--json")
    assert (code, err) == (0, "")
    stages = [step["stage"] for step in json.loads(out)["steps"]]
    assert stages == ["init", "pt", "sft", "dpo", "kto", "merge", "quantize"]


def test_what_cannot_be_read_is_named_and_a_file_is_not_overwritten(files, tmp_path):
    code, _, err = files("init", "mine.yaml", "--data", "odd.jsonl", "--data", "no.csv")
    assert code == 2
    assert err.splitlines()[0] == (
        "--data odd.jsonl: `odd.jsonl`: no format fits its columns `a`, `b`, `c`; "
        "write it into the config with `format:` and `columns:`"
    )
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    code, _, err = files("init", "mine.yaml", "--data", "qa.csv")
    assert (code, err) == (2, "mine.yaml: is there already; name another file, or replace it with --force\n")
    assert (tmp_path / "mine.yaml").read_text() == "x: 1\n"
    assert files("init", "--data", "qa.csv")[0] == 0
    code, _, err = files("init", "other.yaml")
    assert (code, err) == (2, "--data: name at least one file of texts, conversations or preference pairs\n")


def test_few_rows_give_a_tiny_model_steps_with_a_learning_rate(files, tmp_path):
    files("init", "mine.yaml", "--data", "prefer.jsonl", "--data", "book.txt")
    trainer = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["stages"]["pt"]["trainer"]
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 4
    assert "warmup_steps" not in trainer  # a warmup of one step is the whole of a run of one step


def test_names_and_paths_that_yaml_reads_otherwise_are_quoted(files, project, tmp_path):
    project.model("model: 'a' #1")
    odd = tmp_path / "it's: #1"
    odd.mkdir()
    for name in ("null.csv", "true.csv", "1.csv", "数据.csv"):
        (odd / name).write_bytes((tmp_path / "qa.csv").read_bytes())
    data = [word for path in sorted(odd.iterdir()) for word in ("--data", str(path.relative_to(tmp_path)))]
    assert files("init", "mine.yaml", *data, "--no-quantize", "--model", "model: 'a' #1")[::2] == (0, "")
    code, out, err = files("plan", "mine.yaml", "--json")
    assert (code, err) == (0, "")
    assert [step["stage"] for step in json.loads(out)["steps"]] == ["sft", "merge"]
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert "\ntemplate: med   # " in text  # the stub's tokenizer has no template and none of ChatML's tokens


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--template medd", "there is no template `medd` (a name, a .jinja or a .json file); did you mean `med`?"),
        ("--template my.jinja", "the template `my.jinja` cannot be read (No such file or directory)"),
        ("--model ./models/qwen", "the model folder `./models/qwen` does not exist; name a folder or a Hub model as "
         "`org/name@commit`"),
        ("--model models/qwen", "the model folder `./models/qwen` does not exist; name a folder or a Hub model as "
         "`org/name@commit`"),
        ("--model org/name", "is no folder here; a model on the Hub is named with its commit, `org/name@COMMIT`; "
         "`git ls-remote https://huggingface.co/org/name HEAD` shows it"),
        ("--data notes.md", "`notes.md` is not read as it is; `cp notes.md notes.txt` makes it a text, with its marks"),
        ("--data a.pdf", "`a.pdf` is not read as it is; `pdftotext -layout a.pdf a.txt` makes it a text"),
    ],
)  # fmt: skip
def test_what_a_config_could_not_use_is_said_at_once(files, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("pipeline.tools.convert_hub.hub_commit", lambda kind, name: None)
    for name in ("notes.md", "a.pdf"):
        (tmp_path / name).write_text("text")
    code, _, err = files("init", "mine.yaml", "--data", "qa.csv", *words.split())
    assert (code, err) == (2, f"{words}: {said}\n")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_name_on_the_hub_gets_its_commit(files, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tools.convert_hub.hub_commit", lambda kind, name: "a" * 40)
    assert files("init", "mine.yaml", "--data", "qa.csv", "--model", "org/name")[0] == 0
    assert f"\nmodel: org/name@{'a' * 40}\n" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
