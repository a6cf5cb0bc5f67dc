"""Streamed rows: trained on as they are read, kept nowhere, and a stopped run ends with the same bytes."""

import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import pt, sft
from stages.chat import encoding
from stages.data.cleaning_steps import Length
from stages.data.source import Source
from stages.model.inputs import Inputs
from stages.runtime.errors import Interrupted, StageError
from stages.training import loop, streaming

pytestmark = pytest.mark.train

ASKED = {"max_steps": 6, "max_length": 200, "per_device_train_batch_size": 4}


def write(path: Path, count: int, word: str = "第") -> Source:
    rows = [{"instruction": f"{word}{number}个问题？", "output": f"多休息{number}天。"} for number in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path), format="alpaca")


def answers(done) -> list[str]:
    """What the rows of the stream say, in their order."""
    tokenizer = done.trainer.processing_class
    words = (tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in done.trainer.train_dataset)
    return [text.removesuffix(tokenizer.eos_token) for text in words]


def test_every_row_streams_once_and_nothing_is_kept(tiny, train, tmp_path):
    source = write(tmp_path / "a.jsonl", 300)
    done = train(sft, [tiny("llama")], source, streaming=True, trainer=ASKED)
    assert sorted(answers(done)) == sorted(f"多休息{number}天。" for number in range(300))
    assert answers(done) != [f"多休息{number}天。" for number in range(300)]
    assert not (done.out.parent / ".prepared").exists()
    assert done.metrics["steps"] == 6
    assert done.metrics["streamed"]["rows"] == 300  # all are in the buffer, and no row is counted twice


@pytest.mark.parametrize("stage", [sft, pt], ids=["sft", "pt packed"])
def test_a_stopped_stream_ends_with_the_same_bytes(tiny, train, rows, tmp_path, at, stop, stage):
    data = write(tmp_path / "a.jsonl", 40) if stage is sft else rows("text", 40)
    asked = {"streaming": True, "trainer": {**ASKED, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}}
    whole = train(stage, [tiny("llama")], data, **asked)
    out = tmp_path / "saves" / "stage"
    out.parent.mkdir()
    with pytest.raises(Interrupted, match=r"^stopped at step 3 of 6$"):
        train(stage, [tiny("llama")], data, out=out, callback=at(3, "on_step_end", stop), **asked)
    again = train(stage, [tiny("llama")], data, out=out, **asked)
    assert (out / "adapter_model.safetensors").read_bytes() == (whole.out / "adapter_model.safetensors").read_bytes()
    assert again.metrics == whole.metrics


def test_weights_draw_without_end(tiny, train, tmp_path):
    few, many = write(tmp_path / "a.jsonl", 5, "甲"), write(tmp_path / "b.jsonl", 50, "乙")
    mixture = {"sources": [few, many], "weights": [1, 3]}
    config = sft.Config(model="m", data=mixture, streaming=True, trainer={"max_steps": 1})
    drawn = [
        row["messages"][0]["content"][0]
        for _, (_, row) in zip(range(2000), streaming._mixed(config.draw()), strict=False)
    ]
    assert 0.22 < drawn.count("甲") / 2000 < 0.28


def test_held_out_rows_are_prepared_and_rows_like_them_are_not_trained_on(tiny, train, tmp_path, at):
    long = "头疼了三天，应该怎么办才好？请详细说明一下。"
    data, held = write(tmp_path / "a.jsonl", 20), tmp_path / "held.jsonl"
    with open(data.path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": long, "output": "多喝水，多休息。"}) + "\n")
    held.write_text(json.dumps({"instruction": long, "output": "多喝水，多休息！"}), encoding="utf-8")
    source = Source(path=str(held), format="alpaca")
    locked = []

    def try_lock(model):
        (lock,) = tmp_path.glob("saves/.locks/*.reader")
        with open(lock, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(lock)

    asked = {"streaming": True, "eval_data": [source], "trainer": ASKED, "out": tmp_path / "saves" / "sft"}
    asked["out"].parent.mkdir()
    done = train(sft, [tiny("llama")], data, callback=at(1, "on_step_end", try_lock), **asked)
    assert len(locked) == 1  # so `gc` leaves them alone
    assert "多喝水，多休息。" not in answers(done)
    assert len(answers(done)) == 20
    assert done.metrics["eval_loss"] > 0


def test_held_out_rows_of_a_stream_are_rehearsed(tiny, tmp_path):
    data, held = write(tmp_path / "a.jsonl", 20), write(tmp_path / "held.jsonl", 3)
    asked = {"model": "m", "data": [data], "eval_data": [held], "streaming": True, "trainer": ASKED}
    out = tmp_path / "saves" / "sft"
    out.mkdir(parents=True)
    sft.STAGE.rehearse(sft.Config(**asked), Inputs(model=[str(tiny("llama"))]), out)
    assert len(list(tmp_path.glob("saves/.prepared/*/train.arrow"))) == 1
    long = sft.Config(**{**asked, "trainer": {**ASKED, "max_length": 5}})
    with pytest.raises(StageError, match=r"^all 3 rows lose their answer at `max_length` 5; raise it$"):
        sft.STAGE.rehearse(long, Inputs(model=[str(tiny("llama"))]), out)


def test_too_many_bad_rows_stop_a_stream_early(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_CHECKED", 10)
    data = write(tmp_path / "a.jsonl", 200)
    path = Path(data.path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(['{"instruction": "a"}', *lines]), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], data, streaming=True, trainer=ASKED)
    assert str(caught.value) == (
        f"1 of the first 10 rows are bad, and `max_dropped` is 0.01: {path}:1: the row has no `output`; "
        "alpaca rows need `instruction` and `output` (map other names with `columns:`)"
    )


@pytest.mark.parametrize("weights", [[], [1]], ids=["in order", "by weights"])
@pytest.mark.parametrize("why", ["cleaned", "held out", "too long"])
def test_a_stream_without_a_row_to_train_on_ends(tiny, tmp_path, monkeypatch, weights, why):
    monkeypatch.setattr(streaming, "_CHECKED", 40)
    data = write(tmp_path / "a.jsonl", 30).model_copy(
        update={"clean": [Length(step="length", min=500)] if why == "cleaned" else []}
    )
    asked = {"eval_data": [data]} if why == "held out" else {}
    config = sft.Config(model="m", data={"sources": [data], "weights": weights}, streaming=True, **asked)
    args = SimpleNamespace(max_length=5 if why == "too long" else 200, packing=False, seed=1)
    tokenizer = loop.tokenizer(config, Inputs(model=[str(tiny("llama"))]))
    with pytest.raises(StageError) as caught:
        next(iter(streaming.rows(config.draw(), tokenizer, args, encoding.Tokens(), cut=False)))
    read = 0 if why == "cleaned" else 256 if weights else 30
    similar, long = (read if why == reason else 0 for reason in ("held out", "too long"))
    if why == "cleaned" and weights:
        assert str(caught.value) == f"`{data.path}` has no row left to draw; remove it from the mixture"
    else:
        assert str(caught.value) == (
            f"no row is left to train on: of the {read} rows that `clean` keeps, {similar} are near duplicates of "
            f"held-out rows, and {long} lose their answer at `max_length` {args.max_length}"
        )


def test_a_short_stream_drops_no_more_rows_than_is_allowed(tiny, train, tmp_path):
    data = write(tmp_path / "a.jsonl", 20)
    with open(data.path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "问" * 300, "output": "多喝水。"}))
    with pytest.raises(StageError, match=r"^1 of 21 rows lose their answer at `max_length` 200, the first at .*:21; "):
        train(sft, [tiny("llama")], data, streaming=True, trainer=ASKED)


def test_what_a_stream_cannot_do_is_said_before(tmp_path):
    data = Source(path="a.jsonl", format="alpaca", clean=["html", "near_duplicates"])
    asked = {"model": "m", "data": [data], "streaming": True, "eval_size": 0.1}
    assert streaming.check(sft.Config(**asked)) == [
        ("trainer.max_steps", "a stream has no known length; set `max_steps`"),
        ("eval_size", "rows of a stream cannot be held out before they are read; name others with `eval_data`"),
        (
            "streaming",
            "`near_duplicates` compares all rows, which a stream never has together; take it out of `clean`",
        ),
    ]
