"""Other people's data sets: each entry of LLaMA-Factory's dataset_info.json, expressed as a `Source`."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.data.source import Source, rows_of

INFO = Path(__file__).parents[3] / "shared" / "data" / "LLaMA-Factory" / "dataset_info.json"
COMMIT = "0" * 40  # their entries have no revision; users of an entry look it up
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "chosen": "chosen", "rejected": "rejected"}
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TAGS |= {"observation_tag": "tool", "function_tag": "function_call"}
MEDIA = "images, video and audio are not supported; only text is"


def translated(entry):
    """Our settings for one of their entries. Raises ValueError when it cannot be expressed.

    As in their `data/parser.py`, `columns` replaces all default columns, and `tags` all default tags.
    """
    settings = {"path": entry.get("file_name")}
    if "file_name" not in entry:
        if "hf_hub_url" not in entry:
            raise ValueError("it is on ModelScope only; download it and name its files")
        subset = entry.get("folder") or entry.get("subset")
        settings = {"path": f"{entry['hf_hub_url']}@{COMMIT}", "subset": subset, "split": entry.get("split")}
    talk = entry.get("formatting") == "sharegpt"
    theirs = entry.get("columns") or ({"messages": "conversations"} if talk else ALPACA)
    labelled = "kto_tag" in theirs
    if entry.get("ranking"):
        kind, ours = "preference", {"messages": "conversations"}
    elif labelled:
        kind, ours = "labelled", {"prompt": "instruction", "response": "output"}
    elif talk:
        kind, ours = "sharegpt", {"messages": "conversations"}
    elif "response" not in theirs:
        kind, ours = "text", {"prompt": "text"}
    else:
        kind, ours = "alpaca", {}
    ours = {**ALPACA, "kto_tag": "label", **ours}
    columns = {ours.get(name, name): column for name, column in theirs.items()}
    tags = entry.get("tags", {})
    keys = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    return {
        **settings,
        "format": kind,
        "columns": {name: column for name, column in columns.items() if name != column},
        "roles": {ours: tags[tag] for tag, ours in TAGS.items() if tag in tags},
        "message_keys": {ours: key for ours, key in keys.items() if key},
        **({"columns": columns} if not {"images", "videos", "audios"}.isdisjoint(theirs) else {}),
    }


def refusal(entry):
    """Why an entry has no `Source`; None when it has one."""
    try:
        Source.model_validate(translated(entry), strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    except ValueError as error:
        return str(error)
    return None


CHAT = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
HERE = {"file_name": "x.json"}
ROLES = {"user": "user", "assistant": "assistant"}
KEYS = {"role": "role", "content": "content"}
SHAPES = [  # an entry of every shape that their file has, and settings of its `Source`
    (HERE, {"format": "alpaca"}),
    ({"hf_hub_url": "a/b", "ms_hub_url": "c/d", "om_hub_url": "e/f"}, {"path": f"a/b@{COMMIT}", "format": "alpaca"}),
    ({"hf_hub_url": "wiki_qa", "columns": {"prompt": "question", "response": "answer"}},
     {"path": f"wiki_qa@{COMMIT}", "columns": {"instruction": "question", "output": "answer"}}),
    ({**HERE, "columns": {"prompt": "question", "response": "response", "system": "system_prompt"}},
     {"columns": {"instruction": "question", "output": "response", "system": "system_prompt"}}),
    ({**HERE, "columns": {"prompt": "input", "response": "output"}}, {"columns": {"instruction": "input"}}),
    ({"hf_hub_url": "a/b", "split": "validation", "columns": {"prompt": "content", "response": "summary"}},
     {"split": "validation", "columns": {"instruction": "content", "output": "summary"}}),
    ({"hf_hub_url": "a/b", "subset": "default", "columns": {"prompt": "raw_content"}},
     {"format": "text", "subset": "default", "columns": {"text": "raw_content"}}),
    ({"hf_hub_url": "a/b", "folder": "python", "columns": {"prompt": "content"}},
     {"format": "text", "subset": "python", "columns": {"text": "content"}}),
    ({"file_name": "x.txt", "columns": {"prompt": "text"}}, {"format": "text", "columns": {}}),
    ({**HERE, "formatting": "sharegpt"}, {"format": "sharegpt", "columns": {}}),
    ({**HERE, "formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
     {"format": "sharegpt", "columns": {}}),
    ({**HERE, "formatting": "sharegpt", "columns": {"messages": "messages"}},
     {"format": "sharegpt", "columns": {"conversations": "messages"}}),
    ({**HERE, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {**CHAT, "system_tag": "system"}},
     {"columns": {"conversations": "messages"}, "roles": {**ROLES, "system": "system"}, "message_keys": KEYS}),
    ({"hf_hub_url": "a/b", "split": "train_sft", "formatting": "sharegpt", "columns": {"messages": "conversation"},
      "tags": CHAT}, {"split": "train_sft", "columns": {"conversations": "conversation"}, "roles": ROLES}),
    ({**HERE, "ranking": True}, {"format": "preference", "columns": {}}),
    ({**HERE, "ranking": True, "columns": {"prompt": "question", "chosen": "c", "rejected": "r", "system": "s"}},
     {"columns": {"instruction": "question", "chosen": "c", "rejected": "r", "system": "s"}}),
    ({**HERE, "ranking": True, "formatting": "sharegpt",
      "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
     {"format": "preference", "columns": {}}),
    ({**HERE, "formatting": "sharegpt", "columns": {"messages": "completion", "kto_tag": "label"}, "tags": CHAT},
     {"format": "labelled", "columns": {"messages": "completion"}}),
    ({**HERE, "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
     {"format": "labelled", "columns": {"instruction": "prompt", "output": "completion"}}),
]  # fmt: skip
REFUSED = [
    ({"ms_hub_url": "a/b"}, "it is on ModelScope only; download it and name its files"),
    *[
        ({**HERE, "formatting": "sharegpt", "columns": {"messages": "messages", media: media}},
         f"`columns` maps `{media}`, and {MEDIA}")
        for media in ("images", "videos", "audios")
    ],
    ({**HERE, "ranking": True, "columns": {"prompt": "question", "chosen": "chosen", "images": "image"}},
     f"`columns` maps `images`, and {MEDIA}"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "expected"), SHAPES)
def test_a_shape_of_theirs_has_its_source(entry, expected):
    made = Source.model_validate(translated(entry), strict=True)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(("entry", "reason"), REFUSED)
def test_a_shape_of_theirs_that_is_refused(entry, reason):
    assert refusal(entry) == reason


def test_what_a_shape_reads(tmp_path, monkeypatch):
    """Renamed columns, roles and keys together, on rows that such data sets hold."""
    monkeypatch.chdir(tmp_path)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    for entry, row, expected in [
        (SHAPES[4][0], {"input": "q", "output": "r", "kind": "x"}, {"messages": said}),
        (SHAPES[12][0], {"messages": said}, {"messages": said}),
        (SHAPES[15][0], {"question": "q", "c": "r", "r": "s", "s": ""},
         {"prompt": said[:1], "chosen": said[1:], "rejected": [{"role": "assistant", "content": "s"}]}),
        (SHAPES[17][0], {"prompt": [{"role": "user", "content": "q"}], "completion": said, "label": False},
         {"prompt": said[:1], "completion": said[1:], "label": False}),
        (SHAPES[18][0], {"prompt": "q", "completion": "r", "label": True},
         {"prompt": said[:1], "completion": said[1:], "label": True}),
    ]:  # fmt: skip
        Path("x.json").write_text(json.dumps([row]), encoding="utf-8")
        assert rows_of(Source.model_validate(translated(entry))) == [expected]


@pytest.mark.skipif(not INFO.is_file(), reason="the public file is not here")
def test_every_entry_of_the_file_is_expressed_or_refused_for_a_reason():
    entries = json.loads(INFO.read_text(encoding="utf-8"))
    refused = {name: reason for name, entry in entries.items() if (reason := refusal(entry))}
    media = [name for name, reason in refused.items() if reason.endswith(MEDIA)]
    assert len(entries) == 104
    assert sorted(media) == [
        *("llava_150k_en", "llava_150k_zh", "llava_1k_en", "llava_1k_zh", "mllm_audio_demo", "mllm_demo"),
        *("mllm_pt_demo", "mllm_video_audio_demo", "mllm_video_demo", "pokemon_cap", "rlaif_v", "rlhf_v", "vlfeedback"),
    ]
    assert refused.keys() - {*media} == {"deepctrl"}
    assert refused["deepctrl"] == REFUSED[0][1]
    known = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "ranking", "columns", "tags"}
    assert {key for entry in entries.values() for key in entry} - known == {"subset", "split", "folder"}
