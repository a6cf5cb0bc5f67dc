"""The project as a wheel: built, unpacked, and run from another folder, so that templates and pages must be in it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """\
template: med
data:
  consult: {path: rows.jsonl, format: alpaca}
stages:
  init: {architecture: llama, data: consult, hidden_size: 32, num_hidden_layers: 1, vocab_size: 300}
  sft: {data: consult, trainer: {max_steps: 1, max_length: 512}}
"""


RUN = """
import sys, pipeline
from pipeline.cli import main
print(pipeline.__file__)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(target)], cwd=source, capture_output=True, text=True, check=True
    )
    wheel = target / made.stdout.split()[-1]
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_holds_every_file_of_both_packages(installed):
    wanted = {
        str(path.relative_to(ROOT))
        for top in ("pipeline", "stages")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".jinja")
    }
    held = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.suffix in (".py", ".jinja")}
    assert held == wanted


@pytest.mark.train
def test_an_installed_wheel_runs_and_reports_from_another_folder(installed, tmp_path):
    rows = [{"instruction": f"问题{number}？", "output": f"回答{number}。"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "x.yaml").write_text(CONFIG, encoding="utf-8")

    def pipeline(*words):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        where, _, shown = done.stdout.partition("\n")
        assert Path(where).parent.parent == installed
        return shown

    assert "sft" in pipeline("run", "x.yaml")
    assert [step["state"] for step in json.loads(pipeline("plan", "x.yaml", "--json"))["steps"]] == ["done", "done"]
    pipeline("report", "x.yaml")
    assert "<html" in (tmp_path / "saves/x/report.html").read_text(encoding="utf-8")
