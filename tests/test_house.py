"""The house: imports run one way, no file and no function is too long, and stages are found by their contract alone."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import stages
from stages import Stage, find, kinds

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("pipeline", "stages") for path in (ROOT / top).rglob("*.py"))
ROOMS = ("runtime", "data", "chat", "model", "training", "measuring")  # each may import those before it
FLOORS = {
    "errors": 0,
    "secret": 0,
    "saves": 1,
    "config": 1,
    "plan": 2,
    "run": 3,
    "views": 4,
    "serve": 4,
    "tools": 4,
    "commands": 5,
    "cli": 6,
}
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gptqmodel", "matplotlib")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path):
    """Every module of this project that a file imports anywhere in it, with the line."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module, node.lineno))
    return found


def floor(module):
    """Where a module stands: what it may import is not above it."""
    top, _, inner = module.partition(".")
    room = inner.partition(".")[0]
    if top == "pipeline":
        return 100 + FLOORS[room] if room else 100
    if not room:
        return 0  # the contract: its imports are for types alone, and the next test looks at them
    return 1 + ROOMS.index(room) if room in ROOMS else 50


def arrows_up(modules):
    return [
        f"{module}:{line} imports {other}"
        for module, path in modules.items()
        for other, line in imports(path)
        if other.split(".")[0] in ("pipeline", "stages") and floor(other) > floor(module) and module != "stages"
    ]


def test_imports_run_one_way():
    assert arrows_up(MODULES) == []


def test_stages_import_nothing_of_the_pipeline_and_stage_files_not_each_other():
    found = [(module, other) for module, path in MODULES.items() for other, _ in imports(path)]
    assert not [pair for pair in found if pair[0].startswith("stages") and pair[1].startswith("pipeline")]
    files = {f"stages.{kind}" for kind in kinds()}
    assert not [pair for pair in found if set(pair) <= files]


def test_config_and_saves_do_not_import_each_other_up():
    """Both are on one floor: `saves` knows no config."""
    assert not [module for module, path in MODULES.items() for other, _ in imports(path)
                if module.startswith("pipeline.saves") and other.startswith("pipeline.config")]  # fmt: skip


def test_imports_make_no_circle():
    """Imports for types alone count, too, but for the contract's own."""
    below = defaultdict(set)
    for module, path in MODULES.items():
        if module != "stages":
            below[module] |= {other for other, _ in imports(path) if other in MODULES and other != "stages"}
    done, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in below[module]:
                visit(other)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_the_arrow_test_sees_an_arrow(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from stages.training import loop\n", encoding="utf-8")
    assert arrows_up({"stages.data.x": file}) == ["stages.data.x:2 imports stages.training.loop"]


def test_the_contract_and_every_room_can_be_imported_first_and_without_training_libraries():
    """Each is imported in a fork of a process that has imported none of this project."""
    code = f"""
import importlib, os, sys
import pydantic, typer, yaml
for module in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module(module)
            print(module, sorted({{name.partition('.')[0] for name in sys.modules}} & set({HEAVY!r})), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""
    rooms = ["stages", *(f"stages.{room}" for room in ROOMS), *(f"stages.{kind}" for kind in kinds())]
    firsts = [*rooms, "stages.measuring.gates", "stages.training.settings", "pipeline.plan.placing", "pipeline.cli"]
    done = subprocess.run([sys.executable, "-c", code, *firsts], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in firsts], done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} in line {node.lineno}"


def test_no_stage_is_known_by_its_name_and_no_hook_is_found_by_name():
    """`config` and `plan` ask the contract; a kind's name is text of the user."""
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not module.startswith("pipeline") or "hasattr(" not in text, module
        for node in nodes(path):
            if module.startswith(("pipeline.config", "pipeline.plan")) and isinstance(node, ast.Compare):
                known = {value.value for value in ast.walk(node) if isinstance(value, ast.Constant)} & set(kinds())
                assert not known, f"{path}:{node.lineno} asks for {known}"
            if module.startswith("pipeline") and isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                assert "module" not in ast.unparse(node.args[0]), f"{path}:{node.lineno}"


# The contract


def test_every_kind_answers_the_contract():
    for kind in kinds():
        stage = find(kind)
        assert isinstance(stage, Stage), kind
        assert stage.config.model_config.get("extra") == "forbid", kind
        assert stage.config.model_config.get("frozen"), kind
        assert sys.modules[f"stages.{kind}"].__doc__, kind
        for name in stage.settings:
            assert name in stage.config.model_fields, (kind, name)
        for name in stage.judges_only:
            assert name in stage.config.model_fields, (kind, name)


STAGE = '''"""A stage for a test."""
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from stages import Metrics, Stage
from stages.model.inputs import Inputs


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    return {}


'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A stage file in a folder that counts as one of `stages`."""

    def write(last):
        (tmp_path / "probe.py").write_text(STAGE + last + "\n", encoding="utf-8")
        monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "stages.probe", raising=False)
        importlib.invalidate_caches()
        return find("probe")

    yield write
    sys.modules.pop("stages.probe", None)


WHOLE = "STAGE = Stage(version=1, config=Config, run=run, headline=lambda metrics: 'done'{more})"


def test_a_stage_file_that_answers_is_found(written):
    assert written(WHOLE.format(more="")).version == 1


@pytest.mark.parametrize("hook", [field.name for field in fields(Stage)])
def test_a_misspelt_hook_fails_at_import_with_its_name(written, hook):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{hook}s_'"):
        written(WHOLE.format(more=f", {hook}s_=None"))


@pytest.mark.parametrize("hook", ["version", "config", "run", "headline"])
def test_a_stage_without_a_required_hook_fails_at_import_with_its_name(written, hook):
    given = {"version": "1", "config": "Config", "run": "run", "headline": "str"}
    del given[hook]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{hook}'"):
        written("STAGE = Stage(" + ", ".join(f"{name}={value}" for name, value in given.items()) + ")")


@pytest.mark.parametrize("last", ["", "STAGES = Stage", "STAGE = {'run': run}"])
def test_a_stage_file_without_its_last_lines_says_what_they_must_be(written, last):
    with pytest.raises(TypeError) as caught:
        written(last)
    assert str(caught.value) == "stages/probe.py: its last lines must be `STAGE = Stage(…)`; see stages/__init__.py"
