"""The command that removes what no config needs."""

import sys
from typing import Annotated

from pipeline.commands.app import SAVES, AsJson, Saves, command, option, print_json
from pipeline.views import tables


@command("Clean up", "gc --saves saves")
def gc(
    saves: Saves = SAVES,
    yes: Annotated[bool, option("--yes", help="Remove without asking.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove finished and unfinished work that no config refers to; asks first."""
    from pipeline.views import survey
    from stages.runtime.figures import size_of

    leftovers, doubts = survey.find_leftovers(saves)
    rows = [{"folder": str(item.folder), "size": size_of(item.bytes), "why": item.why} for item in leftovers]
    if not as_json:
        for doubt in doubts:
            print(f"note: {doubt}, so it is not known what it needs; finished and unfinished stages are kept")
        if not leftovers:
            print(f"everything in {saves} is in use")
            return 0
        tables.print_rows(rows)
    agreed = yes or (not as_json and _agreed(len(leftovers), size_of(sum(item.bytes for item in leftovers))))
    # Asked again, because a run may have started meanwhile.
    still = {item.folder for item in survey.find_leftovers(saves)[0]} if agreed else set()
    removed = [item for item in leftovers if item.folder in still and survey.remove(item)]
    if as_json:
        names = {str(item.folder) for item in removed}
        return print_json([{**row, "removed": row["folder"] in names} for row in rows])
    for item in leftovers if removed else []:
        if item not in removed:
            print(f"{item.folder}: kept, because a run has started to use it")
    freed = sum(item.bytes for item in removed)
    print(f"removed {len(removed)} of {len(leftovers)}, {size_of(freed)}" if removed else "nothing was removed")
    return 0


def _agreed(count: int, size: str) -> bool:
    """Ask the user; without a terminal only `--yes` agrees."""
    if not sys.stdin.isatty():
        print("`--yes` removes them without asking")
        return False
    try:
        return input(f"remove these {count}, {size}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
