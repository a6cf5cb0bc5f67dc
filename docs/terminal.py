"""Write terminal.svg, the picture of a terminal on the first page.

First record the demo in a terminal of 100 columns, then draw it:

    stty cols 100; script -qec "pipeline run configs/tiny.yaml" run.raw
    .venv/bin/python docs/terminal.py run.raw
"""

import os
import pty
import re
import subprocess
import sys
import tempfile
from html import unescape
from io import StringIO
from pathlib import Path

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
WIDTH = 100
CONFIG = """model: models/qwen
data:
  consult: {path: data/med_qa.json, format: alpaca}
  prefer:  {path: data/med_prefer.jsonl, format: preference}
stages:
  sft: {data: consult, lora: {r: 8}, trainer: {lerning_rate: 5e-5}}
  dpo: {data: perfer, lora: {r: 8}, trainer: {beta: 0.1}}
  merge:
"""
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "Noto Sans Mono CJK SC", monospace;
 font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def screen(recording: str) -> list[str]:
    """The lines that a terminal shows in the end: a line that was erased is written again. Colours are kept."""
    lines = [""]
    row = 0
    for part in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", recording):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part[0] != "\r" and not part.startswith("\x1b[?"):
            lines[row] += part
    return lines


def run(words: list[str], folder: str) -> list[str]:
    """The lines that a command writes to a terminal."""
    master, slave = pty.openpty()
    here = Path(sys.executable).with_name("pipeline")
    size = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    with subprocess.Popen([here, *words], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=size):
        os.close(slave)
        output = b""
        try:
            while block := os.read(master, 65536):
                output += block
        except OSError:  # the command has ended, and its terminal is closed
            pass
    os.close(master)
    return screen(output.decode())


def draw(recording: str) -> str:
    """The SVG of three commands: a config with mistakes, the recorded run, the plan after a change."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")

    def show(command: str, lines: list[str]) -> None:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        for line in lines:
            text = Text.from_ansi(line.rstrip())
            for part in [text] if text.cell_len <= WIDTH else map(Text, chop_cells(text.plain, WIDTH)):
                console.print(part)
        console.print()

    with tempfile.TemporaryDirectory() as folder:
        for name in ("configs", "data", "saves"):
            (Path(folder) / name).symlink_to(Path.cwd() / name)
        (Path(folder) / "my.yaml").write_text(CONFIG, encoding="utf-8")
        (Path(folder) / "models/qwen").mkdir(parents=True)
        show("pipeline plan my.yaml", [line for line in run(["plan", "my.yaml"], folder) if line])
        lines = screen(recording)
        stages = [line for line in lines if re.match(r"(\x1b\[[\d;]*m)*✓", line)]
        answers = next(i for i, line in enumerate(lines) if "The same question" in line)
        show("pipeline run configs/tiny.yaml", [*stages, "…", *(line for line in lines[answers:] if line.strip())])
        change = "sft.trainer.learning_rate=2e-3"
        after = run(["plan", "configs/tiny.yaml", "--set", change], folder)
        show(
            f"pipeline plan configs/tiny.yaml --set {change}", [line for line in after if line and "note:" not in line]
        )
    return widened(console.export_svg(title="stagewise", code_format=FRAME, unique_id="stagewise"))


def widened(svg: str) -> str:
    """The SVG with the length of Chinese text in cells; rich takes each character for one cell."""

    def length(match: re.Match[str]) -> str:
        characters = unescape(match[3])
        return f'textLength="{float(match[1]) * cell_len(characters) / len(characters):g}"{match[2]}>{match[3]}<'

    return re.sub(r'textLength="([\d.]+)"([^>]*)>([^<]+)<', length, svg)


if __name__ == "__main__":
    recorded = Path(sys.argv[1]).read_bytes().decode()  # bytes: a carriage return is kept
    text = draw("".join(line for line in re.split(r"(?<=\n)", recorded) if not line.startswith("Script ")))
    Path(__file__).with_name("terminal.svg").write_text(text, encoding="utf-8")
