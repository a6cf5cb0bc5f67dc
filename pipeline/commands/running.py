"""The commands that plan, check and run a config."""

from typing import Annotated

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
from pipeline.views import tables
from pipeline.views.controls import without_controls
from pipeline.views.correction import EXAMPLE

ONLINE_HELP = "Check models that are on the Hub alone: fetch their small files, and no weights."
Online = Annotated[bool, option("--online", help=ONLINE_HELP)]


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
    from pipeline.plan.step import refuse_plan
    from pipeline.run import runner
    from pipeline.run.answers import ask_question
    from pipeline.views.progress import View

    planned = planned_steps(config, saves, assignments, until, fresh=fresh or (), ignore_gates=ignore_gates, fetch=True)
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
    answers = ask_question(planned)
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
    as_json: AsJson = False,
) -> int:
    """Show what would run, and why."""
    from pipeline.plan.step import refuse_plan
    from pipeline.views.progress import plan_table

    planned = planned_steps(config, saves, assignments, until, fresh=fresh or (), online=online)
    if as_json:
        print_json(tables.plan_as_json(planned))
    else:
        tables.console().print(plan_table(planned))
        for note in planned.notes:
            print(without_controls(f"note: {note}"), flush=True)
    refuse_plan(planned)
    return 0


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
