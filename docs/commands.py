"""Write commands.md from the command line itself: `.venv/bin/python docs/commands.py`."""
# ruff: noqa: E501 - rows of Markdown tables

from pathlib import Path
from typing import Any

import typer

from pipeline.cli import app
from pipeline.commands.app import PANELS

PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Every command, option and exit code. This page is written by `docs/commands.py` from the program itself; `pipeline COMMAND --help` shows the same.
`CONFIG` is a YAML file ([config.md](config.md)), `STAGE` the name of a stage in it.

## Exit codes

| code | meaning | what to do |
|---|---|---|
| 0 | done | |
| 1 | a stage failed, another run holds the same folder, or an internal error | the message names the reason and the log; fix it and run the same command again |
| 2 | the config or the command line is wrong, or `run` would refuse a stage (so does `plan`); nothing was run | each problem has its file, line and column |
| 3 | a gate failed; later stages were not run, and all results are kept | change the stage or the gate, or `run --ignore-gates` |
| 75 | interrupted by Ctrl-C or a signal | run the same command again; it goes on |

COMMANDS write JSON with `--json`. Messages go to the standard error, results to the standard
output. `pipeline --version` shows the version, `pipeline --install-completion` installs completion in the shell. The
key of `serve` is read from `STAGEWISE_API_KEY`, the token of the Hub from `HF_TOKEN`, and a mirror of the Hub from `HF_ENDPOINT`.
"""


def page() -> str:
    """The text of commands.md."""
    commands = typer.main.get_command(app).commands
    json = [f"`{name}`" for name, each in commands.items() if any("--json" in param.opts for param in each.params)]
    parts = [HEAD.replace("COMMANDS", f"{', '.join(json[:-1])} and {json[-1]}")]
    for panel in PANELS:
        parts.append(f"\n## {panel}\n")
        parts += [_command(name, each) for name, each in commands.items() if each.rich_help_panel == panel]
    return "".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    words = [name, *(_argument(one) for one in arguments)]
    words += [f"{one.opts[0]} {one.metavar}" for one in options if one.required]
    rows = [f"| `{_argument(one)}` | {_cell(one.help)} |" for one in arguments]
    rows += [f"| {_option(one)} | {_cell(one.help)} |" for one in options]
    return (
        f"\n### `pipeline {name}`\n\n{command.help}\n\n```\npipeline {' '.join(words)} [OPTIONS]\n"
        f"{command.epilog.removeprefix('Example: ')}\n```\n\n| argument or option | meaning |\n|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _argument(param: Any) -> str:
    word = f"{param.metavar}{' …' if param.nargs == -1 else ''}"
    return word if param.required else f"[{word}]"


def _option(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    value = "" if param.is_flag else f" `{param.metavar}`"
    return f"{names}{value}{' (may be repeated)' if param.multiple else ''}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
