"""The chat in the terminal: its commands, its history, two models."""

import io
import json

import pytest

pytestmark = pytest.mark.train
QUESTION = "感冒了怎么办？"


@pytest.fixture
def chat(engine):
    from rich.console import Console

    from pipeline.serve.chat import Chat
    from stages.model.live import Sampling

    def start(names=("dpo",), **settings):
        out = io.StringIO()
        console = Console(file=out, width=200)
        return Chat(dict.fromkeys(names, engine), console, Sampling(temperature=0), 8, **settings), out

    return start


def test_an_answer_is_the_engines_and_the_next_one_sees_the_history(chat, engine):
    talk, out = chat()
    assert talk.take(QUESTION)
    first = engine.answer([{"role": "user", "content": QUESTION}], 8)
    assert out.getvalue() == f"{first} … (cut at 8 tokens; `/set max_tokens=16` allows more)\n"
    talk.take("还有呢？")
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "还有呢？"},
    ]
    assert talk.histories["dpo"] == [*turns, {"role": "assistant", "content": engine.answer(turns, 8)}]


def test_two_models_answer_under_their_names(chat, engine):
    talk, out = chat(("dpo", "base"))
    talk.take(QUESTION)
    assert [line for line in out.getvalue().splitlines() if line in ("dpo:", "base:")] == ["dpo:", "base:"]
    assert talk.histories["dpo"] == talk.histories["base"]


def test_commands(chat, tmp_path):
    talk, out = chat()
    talk.take("/system 您是一个专业的医生。")
    talk.take(QUESTION)
    assert [message["role"] for message in talk.histories["dpo"]] == ["system", "user", "assistant"]
    talk.take("/set temperature=0.7")
    assert talk.sampling.temperature == 0.7
    talk.take(f"/save {tmp_path / 'chat.jsonl'}")
    (row,) = map(json.loads, (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["messages"] == talk.histories["dpo"]
    talk.take("/reset")
    assert [message["role"] for message in talk.histories["dpo"]] == ["system"]
    before = talk.sampling
    wrong = ("/set top_p=5", "/set temperature=nan", "/set seed=99999999999999999999", "/set max_tokens=0")
    for line in (*wrong, "/set top_k=1.5", "/rest", "/set temprature=1", "/set top_p=x", "/save /nowhere/x.jsonl"):
        assert talk.take(line)
    assert (talk.sampling, talk.max_tokens) == (before, 8)
    assert out.getvalue().splitlines()[-9:] == [
        "`top_p`: Input should be less than or equal to 1",
        "`temperature`: Input should be a finite number",
        "`seed`: Input should be less than 9223372036854775808",
        "`max_tokens`: an answer has 1 token at least",
        "`1.5` is not a whole number; write it as `/set top_k=…`",
        "there is no command `/rest`; did you mean `/reset`?",
        "there is no setting `temprature`; did you mean `temperature`?",
        "`x` is not a number; write it as `/set top_p=…`",
        "`/nowhere/x.jsonl` cannot be written (No such file or directory)",
    ]
    assert not talk.take("/quit")


def test_a_model_cannot_move_the_cursor(chat, engine, monkeypatch):
    from stages.model import live

    talk, out = chat()
    real = live.generate

    def generate(engine, answers, sampling):
        real(engine, answers, sampling)
        answers[0].on_text("\x1b[2J")

    monkeypatch.setattr("pipeline.serve.chat.generate", generate)
    talk.take(QUESTION)
    assert "\\x1b[2J" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_question_that_got_no_word_is_not_in_the_history(chat, engine, monkeypatch):
    """Ctrl-C before the first token: an empty turn would be no conversation that training knows."""

    def generate(engine, answers, sampling):
        raise KeyboardInterrupt

    talk, _ = chat()
    monkeypatch.setattr("pipeline.serve.chat.generate", generate)
    assert talk.take(QUESTION)
    assert talk.histories["dpo"] == []
