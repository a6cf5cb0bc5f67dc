"""Words on a command line in, an exit code out.

Exit codes: 0 done, 1 a stage failed, 2 the config or the command line is wrong, 3 a gate failed, 75 interrupted.
"""

import io
import os
import sys
from collections.abc import Sequence

import typer

from pipeline.commands import cleaning, inspecting, publishing, running, starting, submitting, using
from pipeline.commands.app import app

__all__ = [
    "app",
    "cleaning",
    "inspecting",
    "main",
    "publishing",
    "running",
    "starting",
    "submitting",
    "using",
]  # importing a module registers its commands


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a character that a GBK or ASCII console lacks becomes `?`, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():  # bars of downloads would stand between the lines of a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return int(typer.main.get_command(app).main(words, prog_name="pipeline", standalone_mode=False) or 0)


if __name__ == "__main__":
    sys.exit(main())
