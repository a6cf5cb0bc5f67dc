"""The commands that plan, check and run a config."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pipeline.commands.app import (
    SAVES,
    AsJson,
    Assignments,
    Config,
    Fresh,
    Saves,
    Until,
    command,
    option,
    planned_steps,
    print_json,
)
from pipeline.errors import ConfigError
from pipeline.views import tables
from pipeline.views.controls import without_controls
from pipeline.views.correction import EXAMPLE

if TYPE_CHECKING:
    from pipeline.plan.estimate import Ask

ONLINE_HELP = "Check models that are on the Hub alone: fetch their small files, and no weights."
Online = Annotated[bool, option("--online", help=ONLINE_HELP)]
GPU_HELP = "Estimate for a GPU with this much memory, such as 24GB (default: this machine)."
RATE_HELP = "How fast one device computes, such as 400TFLOPS (default: as measured on this machine)."
FIT_HELP = "Write the cheapest settings with which each stage fits into the file, and show them."


@command("Run", f"run {EXAMPLE} --until sft")
def run(
    config: Config,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    fresh: Fresh = None,
    ignore_gates: Annotated[
        bool, option("--ignore-gates", help="Go on after a failed gate; this is recorded.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Run every stage that is not done; run it again to go on after a stop."""
    from pipeline.errors import GateClosed
    from pipeline.plan.estimate import Ask
    from pipeline.plan.step import refuse_plan
    from pipeline.run import runner
    from pipeline.run.answers import ask_question
    from pipeline.run.machines import leads
    from pipeline.views.progress import View

    options: dict[str, Any] = {"ask": Ask(), "ignore_gates": ignore_gates, "fetch": True}
    planned = planned_steps(config, saves, assignments, until, fresh=fresh or (), **options)
    refuse_plan(planned)
    out = tables.console(silent=as_json)
    for note in planned.notes:
        tables.print_plain(out, f"note: {note}")
    try:
        with View(planned, out) as view:
            records = runner.run(planned, view)
    except GateClosed:
        tables.print_evaluations(out, planned, view.states)
        raise
    answers = ask_question(planned) if leads(planned) else {}
    if as_json:
        return print_json(tables.run_as_json(planned, records, answers))
    tables.print_run(out, planned, view, records, answers)
    words = [str(config), *(["--saves", str(saves)] if saves != SAVES else [])]
    words += [word for assignment in assignments or () for word in ("--set", assignment)]
    tables.print_next(out, words, has_model=any(step.entry.leaves_model for step in planned.steps))
    return 0


@command("Run", f"plan {EXAMPLE} --set sft.trainer.learning_rate=2e-5")
def plan(
    config: Config,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    fresh: Fresh = None,
    online: Online = False,
    gpu: Annotated[str | None, option("--gpu", metavar="SIZE", help=GPU_HELP)] = None,
    rate: Annotated[str | None, option("--rate", metavar="RATE", help=RATE_HELP)] = None,
    fit: Annotated[bool, option("--fit", help=FIT_HELP)] = False,
    no_estimate: Annotated[bool, option("--no-estimate", help="Leave out memory, steps and time.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show what would run, and why, and what it takes: memory, tokens, steps, disk and time."""
    from pipeline.plan.step import refuse_plan
    from pipeline.tools.fit import write_fitting
    from pipeline.views import estimates
    from pipeline.views.progress import plan_table

    ask = None if no_estimate else _asked(gpu, rate, assignments)
    if (gpu or rate or fit) and ask is None:
        raise ConfigError(["--no-estimate: it leaves out what `--gpu`, `--rate` and `--fit` are for; remove it"])
    planned = planned_steps(config, saves, assignments, until, ask=ask, fresh=fresh or (), online=online)
    if fit:
        print(write_fitting(planned, assignments or ()), end="", file=sys.stderr if as_json else sys.stdout)
        planned = planned_steps(config, saves, assignments, until, ask=ask, fresh=fresh or (), online=online)
    if as_json:
        print_json(tables.plan_as_json(planned))
    else:
        out = tables.console()
        out.print(plan_table(planned))
        for line in estimates.as_lines(planned):
            tables.print_plain(out, line)
        for note in planned.notes:
            print(without_controls(f"note: {note}"), flush=True)
    refuse_plan(planned)
    return 0


def _asked(gpu: str | None, rate: str | None, assignments: Sequence[str] | None) -> "Ask":
    """What the options of `plan` ask of its estimates.

    Raises:
        ConfigError: an option is neither a size nor a rate.
    """
    from pipeline.plan.estimate import Ask
    from pipeline.plan.estimate_rates import parse_rate
    from stages.model.facts import SIZE_PATTERN, parse_size

    if gpu is not None and (not re.match(SIZE_PATTERN, gpu) or not parse_size(gpu)):
        raise ConfigError([f"--gpu {gpu}: is not a size of memory; write it as `24GB` or `80GiB`"])
    speed = parse_rate(rate) if rate is not None else None
    if rate is not None and not speed:
        raise ConfigError([f"--rate {rate}: is not a speed; write it as `400TFLOPS` or `50GFLOPS`"])
    size = parse_size(gpu) if gpu is not None else None
    return Ask(compute=True, gpu=size, rate=speed, assignments=assignments or ())


@command("Run", f"validate {EXAMPLE}")
def validate(
    config: Config,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    online: Online = False,
    as_json: AsJson = False,
) -> int:
    """Check the config, the data and the models; run nothing."""
    planned = planned_steps(config, saves, assignments, until, online=online)
    stages = [step.name for step in planned.steps]
    if as_json:
        return print_json({"stages": stages, "rows": planned.rows, "notes": planned.notes}, indent=None)
    for note in planned.notes:
        print(without_controls(f"note: {note}"))
    rows = ", ".join(f"{name} {count} rows" for name, count in planned.rows.items())
    print(f"{config}: {len(stages)} stages ({' → '.join(stages)}); {rows or 'no data'}; no problem found")
    return 0
