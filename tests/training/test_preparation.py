"""Prepared rows: made once, shared by what agrees, made again when anything is different or damaged."""

import fcntl
import gc
import json
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli
from stages import sft
from stages.chat import encoding, fast_tokens
from stages.chat.template import template_text
from stages.data import drawing
from stages.data.source import Reading, Source
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError
from stages.runtime.hashes import HASHES, Hashes
from stages.training import loop, preparation, sequences

pytestmark = pytest.mark.train


def write(path: Path, count: int = 6, salt: str = "") -> Path:
    rows = [
        {"instruction": f"{salt}第{number}个问题？", "output": f"多休息{number}天。" * 4} for number in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tiny, tmp_path):
    """Prepare the rows of a file as `sft` would; hands out the folder beside what came of it."""
    file = write(tmp_path / "rows.jsonl")
    out = tmp_path / "saves" / "sft-1.part"
    out.mkdir(parents=True)

    def run(architecture="llama", template="med", max_length=200, processes=None, **settings):
        sources = [Source(path=str(file), format="alpaca", **settings.pop("source", {}))]
        data = {"sources": settings.pop("data", sources), "weights": settings.pop("weights", [])}
        config = sft.Config(model="base", data=data, template=template_text(template), **settings)
        args = SimpleNamespace(max_length=max_length, dataset_num_proc=processes, per_device_train_batch_size=8)
        tokenizer = loop.tokenizer(config, Inputs(model=[str(tiny(architecture))]))
        return preparation.prepare(config.draw(), tokenizer, args, out)

    run.file, run.out, run.saves = file, out, tmp_path / "saves"
    return run


def entries(saves: Path) -> list[Path]:
    return sorted((saves / ".prepared").iterdir())


def content(saves: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(saves)): file.read_bytes() for file in (saves / ".prepared").rglob("*") if file.is_file()
    }


def notes(out: Path) -> list[str]:
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "note"]


def test_the_same_rows_are_prepared_once(prepared):
    first = prepared(eval_size=0.5)
    made, moment = content(prepared.saves), entries(prepared.saves)[0].stat().st_mtime_ns
    again = prepared("bloom", eval_size=0.5, trainer={"learning_rate": 1e-3}, lora={"r": 2})  # of the same tokenizer
    assert content(prepared.saves) == made
    assert entries(prepared.saves)[0].stat().st_mtime_ns == moment
    assert [list(first.train), list(first.held)] == [list(again.train), list(again.held)]
    assert first.account == again.account
    (folder,) = entries(prepared.saves)
    told = notes(prepared.out)
    taken = told.index(f"takes the rows that were prepared before, from .prepared/{folder.name}")
    assert told[:taken] == told[taken + 1 :]
    assert told[-1].startswith("held out: ")


@pytest.mark.parametrize(
    "changed",
    [
        {"template": "chatml", "architecture": "qwen2"},
        {"template": "alpaca_zh"},
        {"max_length": 120},
        {"seed": 7, "eval_size": 0.5},
        {"eval_size": 0.5},
        {"weights": [1.0], "rows": 12},
        {"source": {"clean": ["whitespace"]}},
        {"source": {"max_samples": 3}},
    ],
    ids=str,
)
def test_other_rows_are_prepared_anew(prepared, changed):
    prepared()
    changed_rows = prepared(**changed)
    assert len(entries(prepared.saves)) == 2
    assert not any("prepared before" in note for note in notes(prepared.out))
    assert changed_rows.train.num_rows


def test_a_changed_file_is_prepared_anew(prepared):
    before = list(prepared().train)
    state = prepared.file.stat()
    prepared.file.write_bytes(prepared.file.read_bytes().replace("休息3".encode(), "休息9".encode()))
    os.utime(prepared.file, ns=(state.st_atime_ns, state.st_mtime_ns))  # neither its size nor its time tells
    after = list(prepared().train)
    assert [one == other for one, other in zip(before, after, strict=True)] == [True] * 3 + [False] + [True] * 2


@pytest.mark.parametrize("damage", ["a byte", "cut short", "gone", "a torn account"])
def test_damaged_rows_are_prepared_again(prepared, damage):
    prepared()
    made = content(prepared.saves)
    (folder,) = entries(prepared.saves)
    file = folder / ("account.json" if "account" in damage else "train.arrow")
    whole = file.read_bytes()
    middle = len(whole) // 2
    match damage:
        case "a byte":
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        case "gone":
            file.unlink()
        case _:
            file.write_bytes(whole[:middle])
    prepared()
    assert content(prepared.saves) == made
    assert not any("prepared before" in note for note in notes(prepared.out))


def test_several_processes_prepare_the_same_bytes(prepared, monkeypatch):
    write(prepared.file, 300)
    alone = content(prepared.saves) if prepared(processes=1, eval_size=5) else {}
    for folder in entries(prepared.saves):
        _remove(folder)
    monkeypatch.setattr(preparation, "FEW", 0)
    monkeypatch.setattr(drawing, "_ROWS", 16)
    pids, real = prepared.saves / "pids", encoding.encode

    def encode(*arguments, **settings):
        with open(pids, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return real(*arguments, **settings)

    monkeypatch.setattr(encoding, "encode", encode)
    together = prepared(processes=2, eval_size=5)
    used = set(map(int, pids.read_text(encoding="utf-8").split())) - {os.getpid()}
    assert len(used) == 2
    account = json.loads(next(file for name, file in alone.items() if name.endswith("account.json")))["account"]
    assert {**together.account, "padding": 0} == {**account, "padding": 0}
    columns = {name: list(together.train[name]) for name in ("input_ids", "labels")}
    monkeypatch.undo()
    for folder in entries(prepared.saves):
        _remove(folder)
    again = prepared(processes=1, eval_size=5).train
    assert columns == {name: list(again[name]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("processes", [1, 2])
def test_tiktoken_gives_the_same_rows(prepared, monkeypatch, processes):
    write(prepared.file, 300)
    monkeypatch.setattr(preparation, "FEW", 0)
    monkeypatch.setattr(drawing, "_ROWS", 16)
    prepared(processes=processes)
    (folder,) = entries(prepared.saves)
    alone = (folder / "train.arrow").read_bytes()
    _remove(folder)
    monkeypatch.setattr(sequences, "SOME", 3)
    counts, find = prepared.saves / "counts", fast_tokens.find_twin

    def counted(backend):
        twin = find(backend)

        def encode(*arguments):
            with open(counts, "a", encoding="utf-8") as file:
                file.write("a text\n")
            return twin(*arguments)

        return encode

    monkeypatch.setattr(fast_tokens, "find_twin", counted)
    prepared(processes=processes)
    assert (folder / "train.arrow").read_bytes() == alone
    asked = len(counts.read_text(encoding="utf-8").splitlines())
    assert 300 - 3 * 16 * processes <= asked <= 2 * (300 - 2 * 16)  # and once a chunk what ends a prompt


@pytest.mark.parametrize("settings", [{}, {"eval_size": 2}, {"weights": [1.0]}], ids=str)
def test_rows_are_tokenized_while_they_are_read_where_all_are_taken(prepared, monkeypatch, settings):
    write(prepared.file, 64)
    monkeypatch.setattr(drawing, "_ROWS", 16)
    monkeypatch.setattr(preparation, "FEW", 0)
    seen, kept, encode = [], Reading.kept, encoding.encode

    def read(*arguments):
        for placed in kept(*arguments):
            seen.append("read")
            yield placed

    def tokenized(*arguments, **settings):
        seen.append("tokenized")
        return encode(*arguments, **settings)

    monkeypatch.setattr(Reading, "kept", read)
    monkeypatch.setattr(encoding, "encode", tokenized)
    prepared(processes=1, **settings)
    apart = [*["read"] * 64, *["tokenized"] * (5 if "eval_size" in settings else 4)]
    assert seen == (apart if settings else [*["read"] * 16, "tokenized"] * 4)


@pytest.mark.parametrize("settings", [{}, {"eval_size": 2}], ids=str)
def test_bad_rows_at_the_end_of_a_file_stop_the_preparation(prepared, monkeypatch, settings):
    write(prepared.file, 64)
    with open(prepared.file, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a"}\n' * 2)
    monkeypatch.setattr(drawing, "_ROWS", 16)
    monkeypatch.setattr(preparation, "FEW", 0)
    with pytest.raises(StageError, match=r"rows\.jsonl:65: the row has no `output`; .*\(map other names"):
        prepared(processes=2, **settings)
    assert [folder.suffix for folder in entries(prepared.saves)] == [".part"]


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_process_that_is_killed_counts_as_out_of_memory(prepared, monkeypatch):
    monkeypatch.setattr(preparation, "FEW", 0)
    monkeypatch.setattr(drawing, "_ROWS", 2)
    here = os.getpid()

    def encode(*_, **__):
        assert os.getpid() != here, "the work is not done in another process"
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encoding, "encode", encode)
    with pytest.raises(StageError) as caught:
        prepared(processes=2)
    assert str(caught.value) == (
        "one of its processes was ended by signal 9 SIGKILL (kill -9, or the system ran out of memory); rows were "
        "being prepared; set `trainer.dataset_num_proc: 1` (it is 2), or use fewer rows with "
        "`max_samples` of the data"
    )
    assert [folder.suffix for folder in entries(prepared.saves)] == [".part"]
    monkeypatch.undo()
    assert prepared().train.num_rows == 6
    assert [folder.suffix for folder in entries(prepared.saves)] == [""]


def test_a_file_that_was_moved_has_the_same_rows(prepared, tmp_path):
    lines = prepared.file.read_text(encoding="utf-8").splitlines(keepends=True)
    prepared.file.write_text("".join([*lines, lines[0], '{"instruction": "?"}\n']), encoding="utf-8")
    cleaned = {"clean": [{"step": "exact_duplicates"}], "max_dropped": 0.5}
    first = prepared(source=cleaned)
    made = content(prepared.saves)
    old, moved = prepared.file, tmp_path / "elsewhere.jsonl"
    prepared.file = old.rename(moved)
    again = prepared(data=[Source(path=str(moved), format="alpaca", **cleaned)])
    assert content(prepared.saves) == made
    assert list(again.train) == list(first.train)
    (entry,) = again.account["data"]
    assert entry["path"] == str(moved)
    assert entry["dropped"]["exact duplicate"]["first"] == [f"{moved}:7, as {moved}:1"]
    assert entry["dropped"]["bad"]["first"][0].startswith(f"{moved}:8: the row has no `output`")
    assert (
        prepared(data=[Source(path=str(moved), format="alpaca", max_dropped=0.5)]).train.num_rows == 7
    )  # other settings


def test_no_process_of_a_stage_reads_a_data_file_for_its_hash(prepared, monkeypatch):
    """The run has hashed it, and its cache knows the hash."""
    hashes = Hashes(prepared.saves / HASHES)
    hashes.one(prepared.file, clock=prepared.file.stat().st_ctime_ns + 1)
    hashes.save()
    monkeypatch.setattr("stages.runtime.hashes.sha256", lambda path: pytest.fail(f"{path} was hashed"))
    first = prepared()
    assert list(prepared().train) == list(first.train)


def test_a_file_that_changes_while_it_is_read_is_noticed(prepared, monkeypatch):
    real = encoding.encode

    def encode(*arguments, **settings):
        write(prepared.file, 6, salt="另")
        return real(*arguments, **settings)

    monkeypatch.setattr(encoding, "encode", encode)
    with pytest.raises(StageError) as caught:
        prepared()
    assert str(caught.value) == "a data file changed while it was read; run again"
    assert not entries(prepared.saves)


def test_shares_are_told_in_rows_and_tokens(prepared, tiny, tmp_path):
    long = [{"instruction": "问", "output": "很长的回答。" * 20} for _ in range(6)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long), encoding="utf-8")
    sources = [Source(path=str(path), format="alpaca") for path in (prepared.file, tmp_path / "long.jsonl")]
    account = prepared(data=sources, weights=[1, 1], max_length=1000).account
    short, other = account["data"]
    assert short["share_of_rows"] == other["share_of_rows"] == 0.5
    assert short["share_of_tokens"] + other["share_of_tokens"] == 1
    assert short["tokens"] / (short["tokens"] + other["tokens"]) == short["share_of_tokens"] < 0.4
    assert account["longest"] == other["longest"] > short["longest"]


def test_held_out_rows_that_lose_their_answer_are_told(prepared, tmp_path):
    held = [{"instruction": "问" * length, "output": "多喝水。"} for length in (500, 600, 1)]
    lines = [json.dumps(row) + "\n" for row in held]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    asked = {"eval_data": [Source(path=str(file), format="alpaca")]}
    for _ in ("made", "used again"):
        rows = prepared(**asked)
        assert len(rows.held) == rows.account["held_out"] == 1
        assert rows.account["held_out_dropped"] == 2
        found, few = notes(prepared.out)[-2:]
        assert found.endswith("1 held out, 2 more held-out rows are too long and are not measured")
        assert few == "held out: 6 tokens, so their figures say little about new rows; raise `eval_size`, or add rows"
    file.write_text("".join(lines[:2]), encoding="utf-8")
    with pytest.raises(StageError, match=r"^all 2 held-out rows lose their answer at `max_length` 200; raise it$"):
        prepared(**asked)


def test_gc_frees_prepared_rows(prepared, capsys):
    prepared()
    assert cli.main(["gc", "--saves", str(prepared.saves), "--json"]) == 0
    (told,) = [entry for entry in json.loads(capsys.readouterr().out) if ".prepared" in entry["folder"]]
    assert told["why"] == "rows made ready for training"


def test_rows_are_locked_until_nobody_uses_them(prepared):
    rows = prepared()
    (lock,) = (prepared.saves / ".locks").glob("*.reader")
    with open(lock, encoding="utf-8") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert rows.train.num_rows
            del rows
            gc.collect()
        assert not [warning for warning in seen if issubclass(warning.category, ResourceWarning)]
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
