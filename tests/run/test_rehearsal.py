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
            "dpo.trainer.optim=sgd dpo.trainer.optim_args=momentum=x",
            "the optimizer or its schedule refuses `optim`, `optim_args` under `trainer`: could not convert string",
        ),
        ("dpo.trainer.dataloader_prefetch_factor=2", "DPOConfig refuses these settings: --dataloader_prefetch_factor"),
    ],
)
def test_what_the_last_stage_cannot_do_stops_the_run_before_the_first_trains(made, capsys, assignment, told):
    code, out, err = run(made, capsys, *assignment.split())
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
        f"warning: sft: {cut} of {rows} rows ({cut / rows:.0%}) are longer than `max_length` 100 and lose their end, "
        "so the model would not learn to stop after them; raise `max_length`"
    )
    lines = out.splitlines()
    assert lines.index(warning) < lines.index("pt: starts")
    assert lines.count(warning) == 2  # when it is found, and again after the last stage
    kept = [json.loads(line) for line in (made[1] / "small/sft/events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["warning"] for event in kept if event.get("text") == warning.removeprefix("warning: sft: ")] == [True]
    assert not list(made[1].glob("*.rehearsal"))


def test_the_first_run_of_all_is_rehearsed_too(made, tmp_path, capsys):
    config, saves = made
    base = shutil.copytree((saves / "small" / "init").resolve(), tmp_path / "base")
    text = config.read_text(encoding="utf-8")
    first = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("  init:"))
    (tmp_path / "first.yaml").write_text(f"model: {base}\n{first}", encoding="utf-8")
    code, out, err = run((tmp_path / "first.yaml", tmp_path / "saves"), capsys, "dpo.trainer.max_length=16")
    told = "checks its settings and prepares its rows, before `pt` starts"
    few = "so their figures say little about new rows; raise `eval_size`, or add rows"
    cut = "are longer than `max_length` 16 and lose their end, so the model would not learn to stop after them"
    lines = out.splitlines()
    assert code == 1
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: stage `sft`: held out: 6 rows, {few}",
        f"note: stage `dpo`: held out: 4 rows, {few}",
        f"note: stage `dpo`: 24 of the first 24 rows of `prefer` {cut}; raise `max_length`",
    ]
    assert [line for line in lines if line.endswith("starts")] == [f"sft: {told}", f"dpo: {told}"]
    assert err.startswith("error: stage `dpo`: all 20 rows lose their answer at `max_length` 16; raise it")
