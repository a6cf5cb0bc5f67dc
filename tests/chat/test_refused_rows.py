"""Rows that a chat template cannot be used for: each stage drops and counts them, with their places and the reason."""

import json

import pytest

from stages import dpo, sft
from stages.chat.template import template_text
from stages.data.source import Source
from stages.measuring import losses, prompts
from stages.model.generation import load_engine
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

SYSTEM = {"role": "system", "content": "你是医生。"}
NO_SYSTEM = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system turn') }}{%- endif -%}"
WHY = "the chat template cannot render the roles system, user, assistant: no system turn"


def talk(number, *before):
    question = {"role": "user", "content": f"第{number}个问题？"}
    return [*before, question, {"role": "assistant", "content": f"多休息{number}天。"}]


@pytest.fixture(scope="module")
def own():
    return NO_SYSTEM + template_text("med")


@pytest.fixture
def source(tmp_path):
    """Six conversations, of which the third and the last have a system turn."""

    def write(**settings):
        rows = [{"messages": talk(number, *[SYSTEM] * (number in (2, 5)))} for number in range(6)]
        path = tmp_path / "chat.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path), format="messages", **settings)

    return write


def test_a_stage_drops_them_and_says_so(tiny, train, own, source):
    data = source(max_dropped=0.5)
    done = train(sft, [tiny("llama")], data, template=own, trainer={"max_steps": 1})
    assert len(done.trainer.train_dataset) == 4
    assert (done.metrics["rows"], done.metrics["dropped"]) == (6, 2)
    (entry,) = done.metrics["data"]
    assert entry["trained_rows"] == 4
    found = {"rows": 2, "first": [f"{data.path}:3, {data.path}:6: {WHY}"]}
    assert entry["dropped"] == {"refused by the chat template": found}
    said = [json.loads(line) for line in (done.out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    notes = [event["text"] for event in said if event["kind"] == "note"]
    assert f"{data.path}: 6 rows read, 4 to train on, 2 dropped (refused by the chat template)" in notes


@pytest.mark.parametrize("streaming", [False, True])
def test_more_than_allowed_stop_the_stage(tiny, train, own, source, streaming):
    data = source()
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], data, template=own, streaming=streaming, trainer={"max_steps": 1})
    assert str(caught.value) == (
        "the chat template cannot be used for 2 of 6 rows, which is more than `max_dropped` 0.01 of them: "
        f"{data.path}:3, {data.path}:6: {WHY}; choose another `template:`"
    )


def test_a_stream_drops_them(tiny, train, own, source):
    done = train(sft, [tiny("llama")], source(max_dropped=0.5), template=own, streaming=True, trainer={"max_steps": 1})
    streamed = done.metrics["streamed"]
    assert (streamed["rows"], streamed["refused"]) == (4, 2)


def test_a_pair_is_refused_as_a_whole(tiny, train, own, tmp_path):
    rows = [
        {"prompt": talk(number, *[SYSTEM] * (number == 1))[:-1], "chosen": "多休息。", "rejected": "不要。"}
        for number in range(3)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data = Source(path=str(path), format="preference", max_dropped=0.5)
    done = train(dpo, [tiny("llama")], data, template=own, trainer={"max_steps": 1})
    assert len(done.trainer.train_dataset) == 2
    assert done.metrics["data"][0]["dropped"]["refused by the chat template"]["first"] == [f"{path}:2: {WHY}"]


def test_held_out_rows_that_are_refused_are_not_measured(tiny, train, own, source, rows):
    data = rows("alpaca", 8)
    held = [source(max_dropped=0.5)]
    done = train(sft, [tiny("llama")], data, template=own, eval_data=held, trainer={"max_steps": 1})
    assert (done.metrics["held_out"], done.metrics["held_out_refused"]) == (4, 2)


def test_an_evaluation_measures_the_other_rows(tiny, own):
    subject = losses.Subject("base", load_engine([str(tiny("llama"))], own), 512, 2048, 42)
    good, bad = {"messages": talk(0)}, {"messages": talk(1, SYSTEM)}
    both = losses.perplexity(subject, [good, bad])["perplexity"]
    assert [value is None for value in both.rows] == [False, True]
    assert both.rows[0] == losses.perplexity(subject, [good])["perplexity"].rows[0]
    assert losses.perplexity(subject, [bad])["perplexity"].why == WHY
    match = losses.answer_match(subject, [good, {"messages": talk(2)}, bad])["answer_match"]
    assert [value is None for value in match.rows] == [
        False,
        True,
        True,
    ]  # the second has the third's question
    asked = [prompts.Prompt("a", number, row["messages"][:-1]) for number, row in enumerate((good, bad))]
    prompts.ask(subject, asked, {"max_new_tokens": 2, "do_sample": False})
    assert asked[0].answers["base"]["answer"] is not None
    why = "the chat template cannot render the roles system, user: no system turn"
    assert asked[1].answers["base"] == {"answer": None, "why": why}
