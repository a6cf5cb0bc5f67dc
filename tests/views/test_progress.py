"""The view of a run, from made-up events: what a terminal of 80 columns shows, and the plain lines elsewhere."""

import io
import json
import re

import pytest
from planned import INIT, pretend
from rich.console import Console

from pipeline.config.checker import load_config
from pipeline.errors import StageFailed
from pipeline.plan.estimate_result import Device, StageEstimate
from pipeline.plan.placing import build_plan
from pipeline.views.progress import View
from pipeline.views.tables import print_evaluations
from stages.runtime.errors import Interrupted

CONFIG = INIT + "  pt: {data: books, lora: {r: 8}}\n  merge:\n"
NOTE = "4,321 rows read, 12 dropped (too short), 1,234 too much like held-out rows and so not trained on"
SIZES = {"batch": 16, "accumulation": 1, "processes": 1}
PT = {"eval_loss_before": 3.5, "eval_loss": 2.25}


class Run:
    """A view of the config, and a clock."""

    def __init__(self, project, width, *, terminal, seconds=None):
        project.write("x.yaml", CONFIG)
        self.now, self.file = 100.0, io.StringIO()
        self.console = Console(
            file=self.file, width=width, force_terminal=terminal, get_time=lambda: self.now, legacy_windows=False
        )
        planned = build_plan(load_config(project.folder / "x.yaml"), project.folder / "saves")
        device = Device(name="this machine", memory=None, gpu=False)
        known = {name: StageEstimate(device=device, seconds=time) for name, time in (seconds or {}).items()}
        planned.estimates = known
        self.steps = {step.name: step for step in planned.steps}
        self.view = View(planned, self.console)

    def event(self, stage, kind, after=0.0, **values):
        self.now += after
        self.view.event(self.steps[stage], {"kind": kind, "time": self.now, **values})

    def train(self):
        """`pt` up to step 33 of 132, 12 s a step."""
        self.view.step(self.steps["pt"], "running")
        self.event("pt", "note", text=NOTE)
        self.event("pt", "total", steps=132, step=0, **SIZES)
        self.event("pt", "step", step=1, after=12)
        self.event("pt", "log", step=10, after=108, loss=3.21987, num_tokens=10_000)
        self.event("pt", "log", step=33, after=276, loss=2.34567, num_tokens=3_417_000)

    def screen(self):
        """What the terminal shows now, line by line, without styles."""
        with self.console.capture() as shown:
            self.console.print(self.view)
        *lines, last = re.sub(r"\x1b\[[\d;]*m", "", shown.get()).splitlines()
        assert last == ""  # the echo of Ctrl-C at the end of a full line would scroll the screen
        return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def run(project):
    return lambda width=80, *, terminal=True, **more: Run(project, width, terminal=terminal, **more)


def test_a_run_before_it_starts_says_why_each_stage_will_run(run):
    assert run().screen() == ["· init  has not run yet", "· pt    has not run yet", "· merge has not run yet"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_running_stage_shows_a_bar_its_figures_the_time_left_and_what_it_does(run, width):
    live = run(width)
    live.train()
    _, bar, doing, waiting, left = live.screen()
    assert re.fullmatch(r"▸ pt    ━+[╸╺]?━*  33/132 loss 2.346 12,344 tokens/s 20 min left", bar)
    assert len(bar) == width
    assert doing == "        trains with batch 16 × 1 accumulation × 1 process = 16 rows a step"
    assert waiting == "· merge has not run yet"
    assert left == "0 of 3 stages done, at least 20 min left of the run"


def test_a_long_message_does_not_cut_the_time_left(run):
    live = run()
    live.train()
    live.event("pt", "note", text=NOTE)
    _, bar, doing, *_ = live.screen()
    assert bar.endswith(" 20 min left")
    assert doing == f"        {NOTE[:71]}…"


def test_a_stage_without_steps_shows_its_time_and_what_it_does(run):
    live = run()
    live.view.step(live.steps["init"], "running")
    assert live.screen()[1] == "        starts"
    live.event("init", "note", after=75, text="bloom with 659,200 parameters")
    first, doing, *_ = live.screen()
    assert re.fullmatch(r"▸ init  ━+ 75 s", first)
    assert doing == "        bloom with 659,200 parameters"


def test_a_finished_stage_shows_its_time_and_key_figure(run):
    live = run()
    live.train()
    pretend(live.steps["pt"], metrics=PT)
    live.now += 4
    live.view.step(live.steps["pt"], "ran")
    assert live.screen()[1] == "✓ pt     400.0 s  held-out loss 3.500 → 2.250"
    assert live.view.states == {"init": "waiting", "pt": "ran", "merge": "waiting"}


def test_a_stage_that_was_finished_before_shows_its_key_figure(run):
    live = run()
    pretend(live.steps["pt"], metrics=PT)
    live.view.step(live.steps["pt"], "done")
    assert live.screen()[1] == "✓ pt    held-out loss 3.500 → 2.250"


def test_the_time_left_counts_what_later_stages_took_before(run):
    before = run()
    for name in ("init", "merge"):
        pretend(before.steps[name], seconds=600.0, metrics={"parameters": 1, "vocab_size": 1})
    (before.steps["merge"].folder / "model.safetensors").write_bytes(b"damaged")
    live = run()
    assert live.steps["merge"].state == "run"
    live.view.step(live.steps["init"], "done")
    live.train()
    assert live.screen()[-1] == "1 of 3 stages done, 30 min left of the run"


def test_the_time_left_counts_the_estimates_of_later_stages_at_the_measured_speed(run):
    live = run(seconds={"pt": 792.0, "merge": 600.0})
    assert live.screen()[-1].endswith("merge has not run yet")
    live.view.step(live.steps["init"], "done")
    live.view.step(live.steps["pt"], "running")
    assert live.screen()[-1] == "1 of 3 stages done"  # how fast this machine is is not known yet
    live.event("pt", "total", steps=132, step=0, **SIZES)
    live.event("pt", "step", step=1, after=12)
    live.event("pt", "log", step=33, after=384, loss=2.34567)  # 12 s a step: it takes twice as long as estimated
    assert live.screen()[-1] == "1 of 3 stages done, 40 min left of the run"
    pretend(live.steps["pt"], metrics=PT)
    live.now += 1188
    live.view.step(live.steps["pt"], "ran")
    live.view.step(live.steps["merge"], "running")
    assert live.screen()[-1] == "2 of 3 stages done"


@pytest.mark.parametrize("terminal", [True, False])
def test_warnings_and_row_counts_stay_on_the_screen_and_a_warning_is_shown_once(run, terminal):
    seen = run(terminal=terminal)
    with seen.view:
        seen.event("pt", "note", text="9 rows lose their end", warning=True)
        seen.view.step(seen.steps["pt"], "running")
        seen.event("pt", "note", text=NOTE, keep=True)
        seen.event("pt", "note", text="9 rows lose their end", warning=True)
        seen.event("pt", "note", text="measures the held-out rows")
        assert seen.view.stages["pt"].message == "measures the held-out rows"
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen.file.getvalue())
    assert shown.count("warning: pt: 9 rows lose their end") == 1
    assert f"pt: {NOTE}" in shown
    assert list(seen.view.warnings) == ["pt: 9 rows lose their end"]
    assert ("\x1b[33mwarning" in seen.file.getvalue()) == terminal


@pytest.mark.parametrize(
    ("error", "mark", "state"),
    [(StageFailed("out of memory"), "✗", "failed"), (Interrupted("stopped"), "■", "stopped")],
)
def test_a_stage_that_ends_early_keeps_its_bar_and_its_message(run, error, mark, state):
    live = run()

    def work():
        with live.view:
            live.train()
            raise error

    with pytest.raises(type(error)):
        work()
    _, bar, doing, *_ = live.screen()
    assert bar.startswith(f"{mark} pt    ━")
    assert bar.endswith(" 33/132 loss 2.346 12,344 tokens/s")
    assert doing.startswith("        trains with batch 16")
    assert live.view.states["pt"] == state


def test_finished_is_green_and_failed_is_red(run):
    live = run()
    with live.console.capture() as shown:
        for state in ("done", "failed"):
            live.view.stages["pt"].state = state
            live.console.print(live.view)
    assert "\x1b[32m✓\x1b[0m \x1b[32mpt " in shown.get()
    assert "\x1b[31m✗\x1b[0m \x1b[31mpt " in shown.get()


def test_a_resumed_stage_counts_the_time_left_from_the_step_that_it_resumes_at(run):
    live = run()
    live.view.step(live.steps["pt"], "running")
    live.event("pt", "total", steps=132, step=100, **SIZES)
    live.event("pt", "step", step=102, after=60)
    assert live.screen()[1].endswith(" 102/132   15 min left")


def test_without_a_terminal_a_run_is_plain_lines(run):
    plain = run(terminal=False)
    with plain.view:
        plain.train()
        plain.event("pt", "log", step=132, after=1188, loss=2.0)
        plain.view.step(plain.steps["pt"], "ran")
    assert plain.file.getvalue() == (
        "pt: starts\n"
        f"pt: {NOTE}\n"
        "pt: 132 steps, batch 16 × 1 accumulation × 1 process = 16 rows a step\n"
        "pt: step 10/132, loss 3.22, 24 min left\n"
        "pt: step 33/132, loss 2.346, 12,344 tokens/s, 20 min left\n"
        "pt: step 132/132, loss 2, 12,344 tokens/s, 0 s left\n"
        "pt: finished in 1584.0 s\n"
    )


FIGURES = {
    ("preference_accuracy_per_token", "prefer_held"): {"init": 0.5, "pt": 0.625},
    ("answer_margin", "consult_held"): {"init": 0.000016389, "pt": -0.0005333},
    ("reward_accuracy", "prefer_held"): {"init": None, "pt": 1.0},
    ("reward_margin", "prefer_held"): {"init": None, "pt": 7.139},
}
NARROW = """\
metric      data     init    pt
preference_ prefer_  0.5     0.625
accuracy_   held
per_
token
answer_     consult_ 1.6e-05 -0.00053
margin      held
reward_     prefer_  –       1
accuracy    held
reward_     prefer_  –       7.139
margin      held
"""
WIDE = """\
metric                         data          init       pt
preference_accuracy_per_token  prefer_held   0.5        0.625
answer_margin                  consult_held  1.639e-05  -0.0005333
reward_accuracy                prefer_held   –          1
reward_margin                  prefer_held   –          7.139
"""


@pytest.mark.parametrize(("width", "table"), [(60, NARROW), (80, WIDE)])
def test_a_narrow_terminal_breaks_the_name_of_a_metric_only_after_an_underscore(project, width, table):
    project.write("x.yaml", CONFIG + "  evaluate: {data: consult}\n")
    planned = build_plan(load_config(project.folder / "x.yaml"), project.folder / "saves")
    folder = next(planned.reports).folder
    figures = [
        {"metric": metric, "data": data, "model": model, "value": value, "why": "no reference"}
        for (metric, data), values in FIGURES.items()
        for model, value in values.items()
    ]
    project.write(folder / "evaluation.json", json.dumps({"models": ["init", "pt"], "figures": figures}))
    out = Console(file=io.StringIO(), width=width)
    print_evaluations(out, planned, {"evaluate": "done"})
    shown = [line.rstrip() for line in out.file.getvalue().partition(" all of it in ")[2].splitlines()[1:]]
    while shown[0] and not shown[0].startswith("metric"):  # a long path goes on below
        shown.pop(0)
    assert "\n".join(shown) == f"{table}– reward_accuracy, reward_margin of init: no reference"
