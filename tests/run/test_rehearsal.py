"""What a stage would find out after hours is found before the first one trains."""

import json
import shutil

import pytest
from test_run import write_config

from pipeline import cli
from pipeline.saves import artifact

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config and its `saves` with the model made."""
    folder = tmp_path_factory.mktemp("rehearsed")
    config = write_config(folder)
    assert cli.main(["run", str(config), "--saves", str(folder / "saves"), "--until", "init"]) == 0
    return config, folder / "saves"


def run(made, capsys, *assignments):
    config, saves = made
    words = [word for assignment in assignments for word in ("--set", assignment)]
    code = cli.main(["run", str(config), "--saves", str(saves), "--until", "dpo", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("dpo.trainer.max_length=16", "all 20 rows lose their answer at `max_length` 16; raise it"),
        (
            "dpo.trainer.lr_scheduler_type=cosine_with_min_lr",
            "the optimizer or its schedule refuses `lr_scheduler_type` under `trainer`: ",
        ),
        (
            "dpo.trainer.lr_scheduler_kwargs={no_such_word: 1}",
            "the optimizer or its schedule refuses `lr_scheduler_kwargs` under `trainer`: ",
        ),
        ("dpo.trainer.optim_args=x", "the optimizer or its schedule refuses `optim_args` under `trainer`: "),
    ],
)
def test_what_the_last_stage_cannot_do_stops_the_run_before_the_first_trains(made, capsys, assignment, told):
    code, out, err = run(made, capsys, assignment)
    assert code == 1
    assert err.startswith(f"error: stage `dpo`: {told}")
    (log,) = made[1].glob("dpo-*.rehearsal/log.txt")
    assert err.endswith(f"\nits log is {log}\n")
    shutil.rmtree(log.parent)
    assert "pt: starts" not in out
    assert not list(made[1].glob("pt-*"))


def test_rows_that_lose_their_end_are_told_before_training_and_when_it_begins(made, capsys):
    code, out, _ = run(made, capsys, "sft.trainer.max_length=100", "pt.trainer.max_steps=1", "dpo.trainer.max_steps=1")
    assert code == 0
    record = artifact.read((made[1] / "small" / "sft").resolve())
    rows, cut = record["metrics"]["rows"], record["metrics"]["truncated"]
    assert cut > rows / 20
    warning = (
        f"sft: {cut} of {rows} rows ({cut / rows:.0%}) are longer than `max_length` 100 and lose their end, so the "
        "model would not learn to stop after them; raise `max_length`"
    )
    lines = out.splitlines()
    assert lines.count(warning) == 2
    assert lines.index(warning) < lines.index("pt: starts; has not run yet")
    kept = [json.loads(line) for line in (made[1] / "small/sft/events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["warning"] for event in kept if event.get("text") == warning.removeprefix("sft: ")] == [True]
    assert not list(made[1].glob("*.rehearsal"))


def test_the_first_run_of_all_is_rehearsed_too(made, tmp_path, capsys):
    config, saves = made
    base = shutil.copytree((saves / "small" / "init").resolve(), tmp_path / "base")
    text = config.read_text(encoding="utf-8")
    first = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("  init:"))
    (tmp_path / "first.yaml").write_text(f"model: {base}\n{first}", encoding="utf-8")
    code, out, err = run((tmp_path / "first.yaml", tmp_path / "saves"), capsys, "dpo.trainer.max_length=16")
    told = "checks its settings and prepares its rows, before `pt` starts"
    assert (code, out) == (1, f"sft: {told}\ndpo: {told}\n")
    assert err.startswith("error: stage `dpo`: all 20 rows lose their answer at `max_length` 16; raise it")
