"""The command that gives a model to others: an upload to the Hub."""

import sys
from typing import Annotated

from pipeline.commands.app import (
    SAVES,
    AsJson,
    Assignments,
    Config,
    Saves,
    command,
    option,
    planned_steps,
    print_json,
)
from pipeline.commands.using import Stage
from pipeline.views.controls import without_controls
from pipeline.views.correction import EXAMPLE
from stages.runtime.figures import size_of


@command("Use", f"push {EXAMPLE} --stage merge --to org/name")
def push(
    config: Config,
    to: Annotated[str, option("--to", metavar="ORG/NAME", help="The model repository; it is made if need be.")],
    saves: Saves = SAVES,
    stage: Stage = None,
    private: Annotated[bool, option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[
        str, option("--revision", metavar="BRANCH", help="The branch; it is made if need be (default: main).")
    ] = "main",
    yes: Annotated[bool, option("--yes", help="Upload without a question.")] = False,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> int:
    """List what an upload to the Hub would do, and do it after a yes; the token is in HF_TOKEN."""
    from pipeline.saves.locks import reading
    from pipeline.tools import push as pushing

    pushing.check_config(config)
    token = pushing.check_request(to, revision)
    planned = planned_steps(config, saves, assignments, None)
    step = pushing.finished_step(planned, stage)
    with reading([step.folder]):
        prepared = pushing.prepare(planned, step, to, token, private=private, branch=revision)
        changes = bool(prepared.uploads or prepared.removed)
        if not as_json:
            print(*map(without_controls, prepared.lines()), sep="\n")
        if not yes and changes and not as_json and sys.stdin.isatty():
            yes = _agreed()
        address = pushing.upload(prepared, token) if changes and yes else None
    if as_json:
        files = [{"path": file.path, "size": file.size, "state": file.state} for file in prepared.files]
        return print_json({"repository": to, "files": files, "removed": prepared.removed, "commit": address})
    print(_ending(to, changes=changes, count=len(prepared.uploads), size=prepared.size, address=address))
    return 0


def _agreed() -> bool:
    """Whether the user at the terminal says yes."""
    try:
        return input("upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def _ending(to: str, *, changes: bool, count: int, size: int, address: str | None) -> str:
    """What was done, in one sentence."""

    if not changes:
        return f"nothing to upload: {to} has all of it"
    files = f"{count} file{'s' if count != 1 else ''}, {size_of(size)}"
    return f"nothing was uploaded ({files}); `--yes` uploads" if address is None else f"uploaded {files}: {address}"
