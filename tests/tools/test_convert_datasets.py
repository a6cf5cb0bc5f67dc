"""Entries of LLaMA-Factory's dataset_info.json become data sets that read the same rows."""

import json
from pathlib import Path

import pytest
from converted import COMMIT, notes, written

from pipeline.errors import ConfigError
from pipeline.tools.convert import convert
from stages.data.source import rows_of

SHARED = Path(__file__).parents[3] / "shared" / "data" / "LLaMA-Factory"
CHAT = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
HERE = {"file_name": "x.json"}
HUB = {"hf_hub_url": "a/b"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return tmp_path


def converted(entry, stage="sft", **arguments):
    """The data set of one entry, and all that was converted."""
    Path("data/dataset_info.json").write_text(json.dumps({"set": entry}), encoding="utf-8")
    more = " ".join(f"--{name} {value}" for name, value in arguments.items())
    command = f"llamafactory-cli train --do_train --stage {stage} --model_name_or_path org/m --dataset set {more}"
    return written(command)


SHAPES = [  # an entry of every shape that their file has → the settings
    ("sft", HERE, {"path": "data/x.json", "format": "alpaca"}),
    ("sft", {"hf_hub_url": "a/b", "ms_hub_url": "c/d"}, {"path": f"a/b@{COMMIT}", "format": "alpaca"}),
    ("sft", {**HUB, "columns": {"prompt": "question", "response": "answer"}},
     {"path": f"a/b@{COMMIT}", "format": "alpaca", "columns": {"instruction": "question", "output": "answer"}}),
    ("sft", {**HERE, "columns": {"prompt": "q", "response": "response", "system": "s", "history": "h"}},
     {"path": "data/x.json", "format": "alpaca",
      "columns": {"instruction": "q", "output": "response", "system": "s", "history": "h"}}),
    ("sft", {**HUB, "split": "validation", "subset": "zh"},
     {"path": f"a/b@{COMMIT}", "format": "alpaca", "subset": "zh", "split": "validation"}),
    ("pt", {**HUB, "folder": "python", "columns": {"prompt": "content"}},
     {"path": f"a/b@{COMMIT}", "format": "text", "subset": "python", "columns": {"text": "content"}}),
    ("pt", {"file_name": "x.txt", "columns": {"prompt": "text"}}, {"path": "data/x.txt", "format": "text"}),
    ("pt", HERE, {"path": "data/x.json", "format": "text", "columns": {"text": "instruction"}}),
    ("sft", {**HERE, "formatting": "sharegpt"}, {"path": "data/x.json", "format": "sharegpt"}),
    ("sft", {**HERE, "formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
     {"path": "data/x.json", "format": "sharegpt"}),
    ("sft", {**HERE, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": CHAT},
     {"path": "data/x.json", "format": "sharegpt", "columns": {"conversations": "messages"}}),
    ("sft", {**HERE, "formatting": "openai", "columns": {"messages": "messages"}, "tags": CHAT},
     {"path": "data/x.json", "format": "messages"}),
    ("sft", {**HERE, "formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "ich",
                                                        "assistant_tag": "gpt"}},
     {"path": "data/x.json", "format": "sharegpt", "roles": {"user": "ich"},
      "message_keys": {"role": "who", "content": "says"}}),
    ("dpo", {**HERE, "ranking": True}, {"path": "data/x.json", "format": "preference"}),
    ("dpo", {**HERE, "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
     {"path": "data/x.json", "format": "preference", "columns": {"instruction": "q", "chosen": "c", "rejected": "r"}}),
    ("rm", {**HERE, "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "talk", "chosen": "chosen", "rejected": "rejected"}},
     {"path": "data/x.json", "format": "preference", "columns": {"conversations": "talk"}}),
    ("kto", {**HERE, "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": CHAT},
     {"path": "data/x.json", "format": "labelled", "columns": {"conversations": "messages"}}),
    ("kto", {**HERE, "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "tag"}},
     {"path": "data/x.json", "format": "labelled",
      "columns": {"instruction": "prompt", "output": "completion", "label": "tag"}}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "entry", "settings"), SHAPES)
def test_an_entry_becomes_a_data_set(stage, entry, settings):
    _, pipeline = converted(entry, stage)
    source = pipeline.data["set"]
    unset = {"columns": {}, "roles": {}, "message_keys": {}, "subset": None, "split": None, "max_samples": None}
    assert {name: getattr(source, name) for name in ("path", "format", *unset)} == {**unset, **settings}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"ms_hub_url": "a/b"}, "it is on ModelScope only; download it and name its files"),
        ({"om_hub_url": "a/b"}, "it is on Modelers only; download it and name its files"),
        ({"script_url": "x"}, "it is a script, and code of a data set is never run; write its rows into a file"),
        ({"cloud_file_name": "s3://x/y.json"}, "it is in a cloud store; download it and name its files"),
        ({**HERE, "formatting": "sharegpt", "columns": {"messages": "m", "images": "images"}},
         "it has images, and only text is supported"),
        ({"ranking": True}, "`set` names no file"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_read_is_left_out_with_its_reason(entry, reason):
    with pytest.raises(ConfigError) as caught:
        converted(entry)
    assert f"not supported: the data set `set`: {reason}" in str(caught.value)


def test_samples_and_unknown_keys():
    found, pipeline = converted({**HERE, "num_samples": 50, "format": "sharegpt"}, max_samples=80)
    assert pipeline.data["set"].max_samples == 50
    assert notes(found, "unknown") == [
        "`format` in the entry of `set` is no key of dataset_info.json; did you mean `formatting`?"
    ]
    assert notes(found, "differs") == [
        "`num_samples` of `set`: the first rows are read, where LLaMA-Factory draws rows at random"
    ]
    _, pipeline = converted(HERE, max_samples=80)
    assert pipeline.data["set"].max_samples == 80


def test_a_data_set_that_is_not_declared_is_named_with_the_nearest():
    Path("data/dataset_info.json").write_text(json.dumps({"set": HERE}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"`sets`: it is not in dataset_info\.json; did you mean `set`\?"):
        written("llamafactory-cli train --do_train --model_name_or_path org/m --dataset sets")


def test_the_file_is_found_above_the_config_or_where_the_user_says(folder):
    Path("examples/train_lora").mkdir(parents=True)
    text = "model_name_or_path: org/m\nstage: sft\ndo_train: true\ndataset: set\n"
    Path("examples/train_lora/x.yaml").write_text(text, encoding="utf-8")
    Path("data/dataset_info.json").write_text(json.dumps({"set": HERE}), encoding="utf-8")
    _, pipeline = written("examples/train_lora/x.yaml")
    assert pipeline.data["set"].path == "data/x.json"
    Path("other").mkdir()
    Path("other/info.json").write_text(json.dumps({"set": {"file_name": "y.json"}}), encoding="utf-8")
    _, pipeline = written("examples/train_lora/x.yaml", dataset_info=Path("other/info.json"))
    assert pipeline.data["set"].path == "other/y.json"
    Path("data/dataset_info.json").unlink()
    found, pipeline = written("examples/train_lora/x.yaml")
    assert pipeline.data["set"].path == "data/set.json"
    assert notes(found, "to do") == [
        "`data/dataset_info.json` is not found, which describes the data; name it with `--dataset-info`",
        "`set`: its path and format are those of most data sets; correct them under `data`",
    ]
    Path("data/dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data/dataset_info.json: cannot be read \(not valid JSON"):
        written("examples/train_lora/x.yaml")


def test_renamed_columns_roles_and_keys_read_the_rows():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    talk = [{"who": "ich", "says": "q"}, {"who": "gpt", "says": "r"}]
    for index, row, expected in [
        (3, {"q": "q", "response": "r", "s": "", "h": []}, {"messages": said}),
        (12, {"conversations": talk}, {"messages": said}),
        (16, {"messages": said, "label": True}, {"prompt": said[:1], "completion": said[1:], "label": True}),
    ]:
        stage, entry, _ = SHAPES[index]
        _, pipeline = converted(entry, stage)
        Path("data/x.json").write_text(json.dumps([row]), encoding="utf-8")
        assert rows_of(pipeline.data["set"]) == [expected]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public file is not here")
def test_every_entry_of_their_own_file_is_converted_or_refused_for_a_reason():
    entries = json.loads((SHARED / "dataset_info.json").read_text(encoding="utf-8"))
    assert len(entries) == 104
    refused = {}
    for name, entry in entries.items():
        stage = "dpo" if entry.get("ranking") else "kto" if "kto_tag" in entry.get("columns", {}) else "sft"
        command = f"llamafactory-cli train --do_train --stage {stage} --model_name_or_path org/m --dataset {name}"
        more = {"dataset_info": SHARED / "dataset_info.json", "commit_of": lambda *_: COMMIT}
        try:
            convert([command], Path("out.yaml"), **more)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            written(command, dataset_info=SHARED / "dataset_info.json")
    assert {name for name, text in refused.items() if "only text is supported" not in text} == {"deepctrl"}
    assert len(refused) == 14


@pytest.mark.parametrize(("limit", "filled"), [(1000, True), (10, False)])
def test_a_large_file_is_not_searched_for_placeholders(monkeypatch, limit, filled):
    rows = [{"instruction": "who are you", "output": "I am {{name}}."}]
    Path("data/x.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr("pipeline.tools.convert_datasets.READ", limit)
    _, pipeline = converted(HERE)
    assert (pipeline.data["set"].fill == {}) is filled


def test_a_file_that_is_nested_too_deeply_is_left_to_the_plan():
    Path("data/x.json").write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")
    _, pipeline = converted(HERE)
    assert pipeline.data["set"].path == "data/x.json"


def test_placeholders_in_rows_stay_as_they_are_trained_there():
    rows = [{"instruction": "who?", "input": "", "output": "I am {{name}}, made by {{author}}."}]
    Path("data/identity.json").write_text(json.dumps(rows), encoding="utf-8")
    Path("data/dataset_info.json").write_text('{"identity": {"file_name": "identity.json"}}', encoding="utf-8")
    Path("x.yaml").write_text(
        "model_name_or_path: org/m\nstage: sft\ndo_train: true\ndataset: identity\n", encoding="utf-8"
    )
    found, pipeline = written("x.yaml")
    assert pipeline.data["identity"].fill == {}
    assert notes(found, "to do") == [
        "`identity`: its rows hold `{{author}}`, which LLaMA-Factory trains as it is written; to fill it in, write "
        "`fill: {author: …, name: …}` for `fill: {}`"
    ]
