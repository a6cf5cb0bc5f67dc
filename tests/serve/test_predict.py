"""Answers to a file of questions: every format, in order, and after a kill without asking twice."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.train
ROWS = [
    {"instruction": "感冒了怎么办？", "input": "", "output": "多喝水。"},
    {"messages": [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "多休息。"}]},
    {"prompt": "咳嗽三天了，晚上更严重，应该吃什么药？要不要去医院检查？"},
    {"conversations": [{"from": "human", "value": "发烧"}, {"from": "gpt", "value": "量体温。"}]},
    {"nothing": 1},
    {"question": "肚子痛", "history": [["你好", "您好"]]},
]
SETTINGS = {"max_tokens": 6}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def predict():
    from pipeline.serve import predict

    return predict


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS * 4), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(predict, engine, questions, output, **more):
    from pipeline.serve.asked import read_questions

    rows = read_questions(str(questions), None, None)
    settings = predict.Settings(**{**SETTINGS, **more.pop("settings", {})})
    with predict.claimed(output) as part:
        return predict.answer_file(engine, rows, output, settings, "tiny", part, **more)


def test_every_row_has_its_answer_in_the_order_of_the_file(predict, engine, questions, tmp_path):
    result = answer(predict, engine, questions, tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in found] == list(range(1, 25))
    asked = [{"role": "user", "content": "头痛"}]
    assert found[1]["messages"] == asked
    assert found[1]["answer"] == engine.answer(asked, 6)
    assert found[1]["reference"] == "多休息。"
    assert found[1]["prompt_tokens"] == len(engine.prompt(asked))
    assert (found[1]["answer_tokens"], found[1]["finish_reason"]) == (6, "length")
    assert found[5]["messages"][0] == {"role": "user", "content": "你好"}
    assert found[4] == {
        **{"row": 5, "place": f"{questions}:5", "answer": None},
        "error": "the row holds no question in one of `messages`, `conversations`, `prompt`, `instruction`, "
        "`question`, `query`, `input`, `text`; it has `nothing`",
    }
    assert (result.rows, result.answered, result.kept, result.failed) == (24, 20, 0, 4)
    assert result.figures["rouge-l"]["n"] == 12
    assert not list(tmp_path.glob("*.part"))


def test_a_killed_run_goes_on_with_the_same_bytes(predict, engine, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "TOKENS", 120)  # several batches
    answer(predict, engine, questions, tmp_path / "whole.jsonl")
    real, asked = predict.generate, []

    def generate(engine, answers, sampling):
        if len(asked) == 3 and not monkeypatched:
            raise KeyboardInterrupt
        asked.append(len(answers))
        real(engine, answers, sampling)

    monkeypatched = []
    monkeypatch.setattr(predict, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        answer(predict, engine, questions, tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.part"
    assert sum(asked) > 0
    with open(part, "ab") as file:
        file.write(b'{"row": 3, "answer": "torn')  # what kill -9 can leave
    monkeypatched.append(True)
    before = sum(asked)
    result = answer(predict, engine, questions, tmp_path / "out.jsonl")
    assert result.kept == before
    assert sum(asked) == 20
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_asks_nothing_and_another_one_is_not_overwritten(predict, engine, questions, tmp_path):
    from pipeline.errors import ConfigError

    out = tmp_path / "out.jsonl"
    answer(predict, engine, questions, out)
    before = out.stat().st_mtime_ns
    assert answer(predict, engine, questions, out).kept == 24
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ConfigError) as error:
        answer(predict, engine, questions, out, settings={"max_tokens": 7})
    assert str(error.value) == (
        f"--output {out}: exists already; choose another file, or overwrite it with --overwrite"
    )
    assert answer(predict, engine, questions, out, settings={"max_tokens": 7}, overwrite=True).answered == 20


def test_a_csv_with_a_column_of_its_own(tmp_path):
    from pipeline.errors import ConfigError
    from pipeline.serve.asked import read_questions

    path = tmp_path / "questions.csv"
    path.write_text("id,问题\n7,头痛\n8,发烧\n", encoding="gb18030")
    with pytest.raises(ConfigError, match="name the column with the question with `--column NAME`"):
        read_questions(str(path), None, None)
    whole = tmp_path / "whole.csv"
    whole.write_text("问题,回答\n头痛,多休息。\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match="it has `问题`, `回答`; name the column with the question with `--column 问题`"
    ):
        read_questions(str(whole), None, None)
    rows = read_questions(str(path), None, "问题")
    assert [row.question.messages for row in rows] == [
        [{"role": "user", "content": "头痛"}],
        [{"role": "user", "content": "发烧"}],
    ]


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(predict, tmp_path):
    from pipeline.errors import ConfigError

    def refused(path):
        with pytest.raises(ConfigError) as error:
            predict.check_output(path)
        return str(error.value)

    assert refused(tmp_path) == f"--output {tmp_path}: is a folder; name a file, such as `{tmp_path}/answers.jsonl`"
    gone = tmp_path / "gone" / "a.jsonl"
    assert refused(gone) == f"--output {gone}: there is no folder `{gone.parent}`"
    assert refused(Path("/proc/a.jsonl")) == (
        "--output /proc/a.jsonl: `/proc` cannot be written (no such file or directory)"
    )


def test_kill_9_in_the_middle_leaves_the_same_bytes(questions, tiny, tmp_path):
    """The real command in a process of its own, killed after its first answers and run again."""
    questions.write_text(questions.read_text(encoding="utf-8") * 12, encoding="utf-8")
    words = [sys.executable, "-m", "pipeline.cli", "predict", str(tiny("llama", template="qwen"))]
    words += ["--input", str(questions), "--max-tokens", "12", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole, out, part = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.part"))
    subprocess.run([*words, str(whole)], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*words, str(out)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") > 1) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other = subprocess.run([*words, str(out), "--overwrite"], env=environment, capture_output=True, text=True)
    assert (other.returncode, other.stderr) == (
        1,
        f"error: --output {out}: another `predict` is writing it; wait for it, or name another file\n",
    )
    process.kill()
    assert process.wait() == -9
    assert not out.exists()
    subprocess.run([*words, str(out)], env=environment, check=True, capture_output=True)
    assert out.read_bytes() == whole.read_bytes()


def test_two_at_once_leave_one_whole_output(predict, engine, questions, tmp_path):
    """The second waits for none and changes nothing; what it leaves behind is no file of its own."""
    from pipeline.errors import Busy

    out = tmp_path / "out.jsonl"
    with predict.claimed(out) as part, pytest.raises(Busy), predict.claimed(out):
        part.write(b"never")
    assert list(tmp_path.glob("out*")) == []
    assert answer(predict, engine, questions, out).answered == 20
    with predict.claimed(out):  # the lock is that of a file which is gone now
        assert sorted(path.name for path in tmp_path.glob("out*")) == [
            "out.jsonl",
            "out.jsonl.about.json",
            "out.jsonl.part",
        ]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.about.json"]


def test_a_disk_without_locks_is_not_taken_for_another_run(predict, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    out, said = tmp_path / "out.jsonl", []
    with predict.claimed(out, said.append) as part:
        part.write(b"open")
    text = "its disk knows no locks (No locks available); let no other `predict` write it"
    assert said == [f"--output {out}: {text}"]


def test_half_a_character_is_an_error_of_its_row_wherever_it_is(tmp_path):
    from pipeline.serve.asked import as_bytes, read_questions

    path = tmp_path / os.fsdecode(b"\xff.jsonl")  # a name that is not UTF-8
    path.write_text(
        '{"question": "头痛", "answer": "half \\ud83d"}\n'
        '{"half \\ud83d": "头痛"}\n'
        '{"question": "头痛", "answer": "多休息。"}\n',
        encoding="utf-8",
    )
    rows = read_questions(str(path), None, None)
    assert [row.error for row in rows] == [
        "`answer` holds half a character (a lone surrogate); write the whole character",
        "the row holds no question in one of `messages`, `conversations`, `prompt`, `instruction`, `question`, "
        "`query`, `input`, `text`; it has `half \ud83d`",
        "",
    ]
    assert rows[2].place == f"{path}:3"
    assert json.loads(as_bytes({"place": rows[2].place})) == {"place": f"{path}:3"}
    assert len(rows.key()) == 64


def test_the_rows_of_a_large_file_stay_on_disk(tmp_path):
    import tracemalloc

    from pipeline.serve.asked import read_questions

    path = tmp_path / "questions.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(20_000):
            file.write(json.dumps({"question": f"{number} " + "x" * 1000}) + "\n")
    tracemalloc.start()
    rows = read_questions(str(path), None, None, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6_000_000, most  # of 20 MB
    assert (len(rows), rows[19_999].question.messages[0]["content"][:6]) == (20_000, "19999 ")
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]
