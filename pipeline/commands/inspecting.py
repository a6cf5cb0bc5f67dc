"""The commands that show data, states, reports and differences."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pipeline.commands.app import (
    SAVES,
    AsJson,
    Assignments,
    Config,
    Saves,
    Until,
    argument,
    command,
    option,
    planned_steps,
    print_json,
    refuse_assignment,
)
from pipeline.views import tables
from pipeline.views.correction import EXAMPLE


@command("Inspect", f"data {EXAMPLE} consult --rows 5")
def data(
    config: Config,
    name: Annotated[
        str | None, argument(metavar="NAME", help="One data set (default: all).", callback=refuse_assignment)
    ] = None,
    saves: Saves = SAVES,
    rows: Annotated[int, option("--rows", metavar="N", min=0, help="How many rows to show (default: 3).")] = 3,
    assignments: Assignments = None,
    until: Until = None,
    as_json: AsJson = False,
) -> int:
    """Show a summary of the data, and rows as the model sees them with the trained text marked."""
    from pipeline.views import samples

    views = samples.inspect_data(planned_steps(config, saves, assignments, until), name, rows)
    if as_json:
        return print_json([asdict(view) for view in views])
    out = tables.console()
    for view in views:
        tables.print_data(out, view)
    return 0


@command("Inspect", f"status {EXAMPLE}")
def status(
    config: Annotated[Path | None, argument(metavar="CONFIG", help="A YAML file (default: all).")] = None,
    saves: Saves = SAVES,
    as_json: AsJson = False,
) -> int:
    """Show the state of each stage of one config, or of all configs."""
    from pipeline.config.pipeline import folder_name
    from pipeline.errors import ConfigError
    from pipeline.saves.links import not_the_owner
    from pipeline.views import survey

    if config is not None and (text := not_the_owner(saves / folder_name(config), config)) is not None:
        raise ConfigError([text])
    statuses = survey.stage_statuses(saves, folder_name(config) if config is not None else None)
    rows = [{**asdict(status), "folder": str(status.folder)} for status in statuses]
    if as_json:
        return print_json(rows)
    if config is not None and not config.is_file():
        raise ConfigError([f"{config}: there is no such file"])
    if rows:
        tables.print_rows([{"key figure" if key == "figure" else key: row[key] for key in row} for row in rows])
    else:
        of = f" of `{config}`" if config is not None else ""
        print(f"nothing{of} in {saves} yet; `pipeline run CONFIG` fills it")
    return 0


PAGE_HELP = "The page (default: DIR/CONFIG/report.html)."
CURVES_HELP = "Also write loss.png and metrics.csv of each training stage, in CURVES/STAGE/."


@command("Inspect", f"report {EXAMPLE} --out report.html")
def report(
    config: Config,
    saves: Saves = SAVES,
    out: Annotated[Path | None, option("--out", metavar="FILE", help=PAGE_HELP)] = None,
    curves: Annotated[Path | None, option("--curves", metavar="CURVES", help=CURVES_HELP)] = None,
    assignments: Assignments = None,
    until: Until = None,
    as_json: AsJson = False,
) -> int:
    """Write one HTML page of a run: data, curves, figures, answers, gates, lineage."""
    from pipeline.errors import ConfigError
    from pipeline.plan.estimate import Ask
    from pipeline.views import report as report_view

    planned = planned_steps(config, saves, assignments, until, ask=Ask())
    out = out or saves / planned.pipeline.name / "report.html"
    if out.is_dir():
        raise ConfigError([f"--out {out}: is a folder; name a file, such as {out / 'report.html'}"])
    page = report_view.render(planned, assignments or [])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    written = [str(path) for path in (out, *(report_view.write_curves(planned, curves) if curves else ()))]
    if as_json:
        return print_json({"written": written}, indent=None)
    print(*written, sep="\n")
    return 0


@command("Inspect", "diff tiny bloomz_med")
def diff(
    a: Annotated[str, argument(metavar="A", help="A YAML file, its name in DIR, or a folder such as saves/tiny.")],
    b: Annotated[str, argument(metavar="B", help="Another.")],
    saves: Saves = SAVES,
    as_json: AsJson = False,
) -> int:
    """Show what differs between two runs: settings, figures, answers."""
    from pipeline.views import diff as diff_view

    difference = diff_view.compare(a, b, saves)
    print(diff_view.as_json(difference) if as_json else diff_view.as_text(difference))
    return 0
