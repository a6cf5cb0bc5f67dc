"""The rows of a training stage: mixed by weights, cleaned, separated from held-out rows, and accounted for."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli
from stages import sft
from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.chat.template import install_template
from stages.data import cleaning, drawing
from stages.data.source import Source
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

WORDS = "感冒发烧咳嗽头疼失眠胃疼血压饮食锻炼睡眠皮肤牙齿眼睛耳朵心脏肝脏肾脏骨骼肌肉神经"


def source(path: Path, texts: list[str], **settings) -> Source:
    rows = [{"instruction": text, "output": f"关于{text}，应当去看医生。{text * 3}"} for text in texts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path), format="alpaca", **settings)


def different(count: int, salt: int) -> list[str]:
    """Texts that are not near duplicates of each other."""
    draw = random.Random(salt)
    return ["".join(draw.choices(WORDS, k=30)) for _ in range(count)]


def read(data, out, **settings) -> SimpleNamespace:
    weights = settings.pop("weights", [])
    config = sft.Config(model="m", data={"sources": data, "weights": weights}, **settings)
    with drawing.drawn(config.draw(), out) as drawn:
        train = [row for chunk in drawn.chunks for _, row, copies in chunk.trained() for row in [row.row] * copies]
        return SimpleNamespace(train=train, held=drawn.held, account=drawn.account)


@pytest.fixture
def two(tmp_path):
    return [source(tmp_path / "a.jsonl", different(20, 1)), source(tmp_path / "b.jsonl", different(100, 2))]


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_rows_are_drawn_by_their_weights(two, tmp_path):
    found = read(two, tmp_path, weights=[1, 3])
    assert [entry["trained_rows"] for entry in found.account] == [20, 60]
    asked = questions(found.train)
    assert len(set(asked)) == 80
    assert set(asked[:20]) == set(different(20, 1))
    assert asked == questions(read(two, tmp_path, weights=[1, 3]).train)
    assert asked != questions(read(two, tmp_path, weights=[1, 3], seed=7).train)


def test_drawing_more_rows_than_there_are_repeats_them_evenly(two, tmp_path):
    found = read(two, tmp_path, weights=[1, 1], rows=200)
    asked = questions(found.train)
    assert [entry["trained_rows"] for entry in found.account] == [100, 100]
    assert {asked.count(text) for text in different(20, 1)} == {5}
    assert {asked.count(text) for text in different(100, 2)} == {1}


def test_ten_thousand_rows_are_within_a_hundredth_of_their_weights(two, tmp_path):
    found = read(two, tmp_path, weights=[0.37, 0.63], rows=10_000)
    assert [entry["trained_rows"] for entry in found.account] == [3700, 6300]
    assert len(found.train) == 10_000


def test_without_weights_every_row_is_trained_on_in_its_order(two, tmp_path):
    assert questions(read(two, tmp_path).train) == different(20, 1) + different(100, 2)


def test_no_row_to_train_on_is_a_near_duplicate_of_a_held_out_row(tmp_path):
    texts = different(30, 3)
    data = source(tmp_path / "a.jsonl", texts)
    held = source(tmp_path / "held.jsonl", [texts[4], "完全不同的一个问题，关于旅行和天气"])
    path = Path(held.path)
    path.write_text(path.read_text(encoding="utf-8").replace("去看医生", "去看一看医生"), encoding="utf-8")
    found = read([data], tmp_path, eval_data=[held])
    assert questions(found.train) == texts[:4] + texts[5:]
    assert found.account[0]["like_held_out"] == 1
    assert cleaning.overlap(found.held, found.train) == []


def test_held_out_rows_that_leave_nothing_are_refused(tmp_path):
    data = source(tmp_path / "a.jsonl", different(3, 3))
    with pytest.raises(StageError, match=r"^every row to train on is a near duplicate of a held-out row"):
        read([data], tmp_path, eval_data=[data])


def chapters(path: Path, *texts: str) -> Source:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return Source(path=str(path), format="text")


def read_texts(data, out, **settings) -> SimpleNamespace:
    with drawing.drawn(drawing.Draw(sources=data, **settings), out) as drawn:
        train = [row.row["text"] for chunk in drawn.chunks for _, row, copies in chunk.trained() for _ in range(copies)]
        return SimpleNamespace(train=train, held=[row["text"] for row in drawn.held], account=drawn.account)


@pytest.mark.parametrize("seed", range(6))
def test_held_out_texts_are_a_share_of_their_characters(tmp_path, seed):
    draw = random.Random(1)
    long = ["".join(draw.choices(WORDS, k=24)) + "。" for _ in range(400)]
    texts = ["第一章 前言", *("".join(long[start : start + 50]) for start in range(0, 400, 50)), "第二章"]
    data = [chapters(tmp_path / "a.jsonl", *texts)]
    found = read_texts(data, tmp_path, eval_size=0.1, seed=seed)
    whole = sum(map(len, texts))
    assert sum(map(len, found.held)) == pytest.approx(0.1 * whole, rel=0.1)
    assert sum(map(len, found.held)) + sum(map(len, found.train)) == whole
    cut = [(start, end) for start in found.train for end in found.held if start + end in texts]
    assert len(cut) == 1
    assert cut[0][0].endswith("。")
    assert found.account[0]["held_out_in_part"] == 1
    assert drawing.summary(found.account[0]).endswith(f"{len(found.held)} held out, one of them in part")
    again = read_texts(data, tmp_path, eval_size=0.1, seed=seed)
    assert (again.train, again.held) == (found.train, found.held)


def test_a_single_text_is_cut_and_a_number_of_texts_stays_whole(tmp_path):
    text = "\n".join(different(40, 9))
    data = [chapters(tmp_path / "a.jsonl", text)]
    found = read_texts(data, tmp_path, eval_size=0.25)
    assert found.train[0] + found.held[0] == text
    assert found.train[0].endswith("\n")
    assert len(found.held[0]) == pytest.approx(0.25 * len(text), rel=0.1)
    parts = different(5, 11)
    found = read_texts([chapters(tmp_path / "b.jsonl", *parts)], tmp_path, eval_size=2)
    assert (len(found.held), len(found.train), set(found.held + found.train)) == (2, 3, set(parts))
    assert "held_out_in_part" not in found.account[0]


def test_conversations_are_held_out_whole(tmp_path):
    found = read([source(tmp_path / "a.jsonl", different(20, 3))], tmp_path, eval_size=0.1)
    assert (len(found.held), len(found.train)) == (2, 18)


def test_cleaning_that_leaves_nothing_to_hold_out_says_so(tmp_path):
    data = source(tmp_path / "a.jsonl", different(3, 3))
    held = source(tmp_path / "held.jsonl", different(3, 5), clean=[{"length": {"min": 5000}}])
    with pytest.raises(StageError) as caught:
        read([data], tmp_path, eval_data=[held])
    assert str(caught.value) == f"`clean` keeps no row of the held-out data `{held.path}`; loosen it"


def test_cleaning_that_leaves_nothing_says_so(tmp_path):
    data = source(tmp_path / "a.jsonl", different(3, 3), clean=[{"length": {"min": 5000}}])
    with pytest.raises(StageError) as caught:
        read([data], tmp_path)
    assert str(caught.value) == (
        f"no row is left to train on: {data.path}: 3 rows read, 0 to train on, 3 dropped (shorter than 5000 characters)"
    )


def test_cleaning_and_bad_rows_are_in_the_account_and_its_summary(tmp_path):
    texts = different(60, 4)
    path = tmp_path / "a.jsonl"
    clean = ["whitespace", "exact_duplicates", {"contamination": {"against": ["exam"]}}]
    exam = source(tmp_path / "exam.jsonl", [texts[7]])
    data = source(path, [*texts, texts[0]], clean=clean, others={"exam": exam}, max_dropped=0.02)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a"}\n')
    found = read([data], tmp_path)
    assert questions(found.train) == texts[:7] + texts[8:]
    (entry,) = found.account
    assert (entry["read"], entry["kept"], entry["trained_rows"]) == (62, 59, 59)
    assert {reason: lost["rows"] for reason, lost in entry["dropped"].items()} == {
        "bad": 1,
        "exact duplicate": 1,
        next(reason for reason in entry["dropped"] if "exam" in reason): 1,
    }
    assert entry["dropped"]["bad"]["first"] == [
        f"{path}:62: the row has no `output`; alpaca rows need `instruction` and `output` (map other names with "
        "`columns:`)"
    ]
    assert drawing.summary(entry).startswith(
        f"{path}: 62 rows read, 59 to train on, 1 dropped (bad), 1 dropped (exact duplicate), "
    )


# `pipeline data`


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": f"问题{number}", "output": "多休息。"} for number in range(4)]
    rows[2]["output"] = "多喝水。" * 40
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = (
        f"model: {tiny('llama')}\ndata:\n  consult: {{path: {folder}/a.jsonl, format: alpaca}}\n"
        f"  books: {{path: {folder}/a.jsonl, format: text, columns: {{text: output}}}}\n"
        "stages:\n  sft: {data: consult, trainer: {max_length: 150, per_device_train_batch_size: 2}}\n"
        "  pt: {data: books, model: $sft, trainer: {max_length: 150}}\n"
    )
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return folder / "x.yaml"


def test_data_shows_the_account_and_what_is_in_the_loss(config, capsys, tmp_path):
    assert cli.main(["data", str(config), "consult", "--rows", "1", "--saves", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["consult, as `sft` reads it", "  4 rows read, 4 kept, 0 of them changed by cleaning"]
    assert "1 cut off at max_length" in lines[3]
    assert lines[-2].endswith("⟦多休息。</s>⟧")
    assert not list(tmp_path.glob("*-*"))


def test_data_shows_sequences_as_long_as_they_are_trained_on(config, capsys, tmp_path):
    assert cli.main(["data", str(config), "--rows", "3", "--saves", str(tmp_path)]) == 0
    consult, books = capsys.readouterr().out.split("\nbooks, as")
    warning = (
        "  warning: 1 of 4 rows (25%) are longer than `max_length` 150 and lose their end, so the model would not "
    )
    assert f"{warning}learn to stop after them; raise `max_length`\n" in consult
    assert "warning" not in books
    third = consult.partition("sequence 3\n")[2]
    text, _, more = third.partition("\n  … ")
    assert text.endswith("⟧")
    assert not text.endswith("</s>⟧")  # the end of turn is not trained on
    assert re.fullmatch(r"\d+ more tokens than `max_length` 150 are cut off\n*", more)
    assert re.search(r"\n  … \d+ more tokens than `max_length` 150 go into further sequences\n", books)


def test_data_as_json_has_the_same_figures_as_the_stage(config, capsys, tmp_path, tiny):
    assert cli.main(["data", str(config), "--json", "--saves", str(tmp_path)]) == 0
    consult, books = json.loads(capsys.readouterr().out)
    assert (consult["data"], consult["stage"], books["data"], books["stage"]) == ("consult", "sft", "books", "pt")
    assert cli.main(["run", str(config), "--until", "sft", "--json", "--saves", str(tmp_path)]) == 0
    account = json.loads((tmp_path / "x" / "sft" / "record.json").read_text(encoding="utf-8"))["metrics"]
    found = consult["tokens"]
    assert found["truncated"] == 1
    for ours, theirs in (("tokens", "tokens"), ("trained", "trained_tokens"), ("padding", "padding")):
        assert found[ours] == account[theirs]
    assert books["tokens"]["sequences"] > 4  # the long text is cut into pieces, and none is lost
    assert books["tokens"]["tokens"] == books["tokens"]["trained"]


def test_data_that_is_not_declared(config, capsys, tmp_path):
    assert cli.main(["data", str(config), "consul", "--saves", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "there is no data `consul`; did you mean `consult`?\n"


def test_a_pair_is_shown_as_two_sequences_with_only_the_answers_in_the_loss(tiny):
    row = {
        "prompt": [
            {"role": "user", "content": "感冒了？"},
            {"role": "assistant", "content": "嗯。"},
            {"role": "user", "content": "怎么办？"},
        ],
        "chosen": [{"role": "assistant", "content": "多休息。"}],
        "rejected": [{"role": "assistant", "content": "不知道。"}],
    }
    tokenizer = _tokenizer(tiny("llama"))
    shown = [encoding.pieces(tokenizer, sequence) for sequence in encoding.encode(Encoder(tokenizer), [row])[0]]
    assert [[words for words, in_loss in sample if in_loss] for sample in shown] == [["多休息。</s>"], ["不知道。</s>"]]


def _tokenizer(folder):
    from stages.model.folder import load_tokenizer

    tokenizer = load_tokenizer([str(folder)])
    install_template(tokenizer, None)
    return tokenizer
