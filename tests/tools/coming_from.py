"""The tables of docs/coming_from.md, written from the tables of the code.

`python tests/tools/coming_from.py` writes them into the page, between the marks `<!-- NAME -->` and `<!-- end -->`.
"""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"


def tables():
    """Name of a table → its text."""
    from pipeline.tools import convert_axolotl_arguments as axolotl
    from pipeline.tools import convert_llamafactory_arguments as llamafactory
    from pipeline.tools import convert_medicalgpt as medicalgpt
    from pipeline.tools import convert_trl as trl
    from pipeline.tools.convert_templates import described

    found = {}
    programs = {"llamafactory": llamafactory, "axolotl": axolotl, "trl": trl, "medicalgpt": medicalgpt}
    for name, module in programs.items():
        same = {theirs: f"`{path}`" for theirs, path in module.SAME.items()}
        found[f"{name}: settings"] = two_columns(("argument", "here"), {**same, **module.MADE})
        found[f"{name}: not supported"] = grouped(("argument", "why"), module.NOT_SUPPORTED)
        found[f"{name}: not needed"] = grouped(("argument", "why"), module.NOT_NEEDED)
    found["llamafactory: templates"] = grouped(("template", "here"), described())
    return found


def two_columns(heads, rows):
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {text} |" for name, text in sorted(rows.items())])


def grouped(heads, rows):
    """Names with the same text share a line."""
    by_text = {}
    for name, text in rows.items():
        by_text.setdefault(text, []).append(f"`{name}`")
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {', '.join(names)} | {text} |" for text, names in by_text.items()])


def with_tables(page):
    """The page with every table as the code has it now."""
    for name, table in tables().items():
        mark = f"<!-- {name} -->"
        assert page.count(mark) == 1, mark
        before, _, after = page.partition(f"{mark}\n")
        page = f"{before}{mark}\n{table}\n<!-- end -->{after.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
