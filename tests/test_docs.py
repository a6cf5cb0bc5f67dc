"""The docs as a whole: links and paths lead somewhere, and every stage, command, key and page is named."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.cli import app
from pipeline.config.checker import load_config
from pipeline.errors import PipelineError
from stages import Stage, find, kinds
from stages.data.source import Source
from stages.model.inputs import Inputs

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data/README.md"]
)
LOG = Path("docs/log.md")  # its entries speak of the files of their day
OLD = (LOG, Path("CHANGELOG.md"))  # these speak of commands of their day, and of mistakes
EXAMPLES = {"stages/half.py"}  # docs/design/contract.md shows how it is written
PATH = re.compile(r"(?<![\w/.-])(?:stages|pipeline|tests|benchmarks)/[\w/.*-]*\w")
KEYS = ("docs/config.md", "docs/evaluate.md", "docs/select.md")


COMMANDS = typer.main.get_command(app).commands


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """Language → the text of each fenced block of a page, in order."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", text(page), re.MULTILINE | re.DOTALL)


def command_lines(page):
    """The words of each command of this project on a page, in blocks and between backticks."""
    for _, block in blocks(page):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if found := re.match(r"(?:\$ |[A-Z_]+=\S+ )*(?:\.venv/bin/)?pipeline( .*)", line):
                yield found[1]
    prose = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        if found := re.match(
            r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?pipeline( .*)", re.sub(r"\$\(.*?\)", "X", span), re.DOTALL
        ):
            yield found[1]


def module(path):
    """A Python file outside the packages."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def anchors(page):
    """The headings of a page as a link names them."""
    heads = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_names_every_page_in_its_list():
    listed = text("README.md").partition("## Read next")[2]
    for page in PAGES:
        if page.parent == Path("docs"):
            assert f"({page})" in listed
    assert "(docs/design/README.md)" in listed


def test_the_first_page_of_the_design_names_every_other():
    for page in PAGES:
        if page.parent == Path("docs/design") and page.name != "README.md":
            assert f"({page.name})" in text("docs/design/README.md")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=str)
def test_every_path_that_is_named_exists(page):
    missing = {path for path in PATH.findall(text(page)) if not any(ROOT.glob(path))}
    assert missing - EXAMPLES == set()


def test_the_tree_names_every_room_and_only_files_that_exist():
    """A file that is missing in the tree is no error: adding one touches no page."""
    tree = text("CONTRIBUTING.md").partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    room, top = ROOT, ROOT
    named = set()
    for line in tree.splitlines():
        if head := re.match(r"( *)(\w+)/ ", line):
            top = ROOT / head[2] if not head[1] else top
            room = top if not head[1] else top / head[2]
            named.add(room)
        for name in re.findall(r"(?<![\w/])_{0,2}\w+\.(?:py|yaml|md)\b", line):
            assert (room / name).is_file() or (top / name).is_file(), f"{name} in {line}"
    for top in ("pipeline", "stages"):
        rooms = {path.parent for path in (ROOT / top).glob("*/__init__.py")}
        assert rooms <= named


def test_every_command_is_named():
    assert len(COMMANDS) > 5
    for page in ("README.md", "README.zh-CN.md"):
        assert [name for name in COMMANDS if f"`pipeline {name}" not in text(page)] == []


def test_the_page_of_commands_is_what_the_program_has():
    assert text("docs/commands.md") == module("docs/commands.py").page(), "run .venv/bin/python docs/commands.py"


def test_the_page_of_commands_has_every_exit_code_of_an_error():
    def below(kind):
        return {kind.exit_code}.union(*map(below, kind.__subclasses__()))

    codes = re.findall(r"^\| (\d+) \|", text("docs/commands.md"), re.MULTILINE)
    assert set(map(int, codes)) == {0} | below(PipelineError)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OLD], ids=str)
def test_every_command_on_a_page_exists_with_its_options(page):
    for line in command_lines(page):
        words = shlex.split(line.split("  #")[0].split(" < ")[0].split(" | ")[0], comments=True)
        ours = words[: words.index("--")] if "--" in words else words  # what follows is for another program
        options = [word.partition("=")[0] for word in ours if word.startswith("--")]
        name = words[0]
        if name.startswith("--"):
            assert name in ("--version", "--help", "--install-completion"), line
        elif name not in ("COMMAND", "…"):
            assert name in COMMANDS, line
            known = {option for param in COMMANDS[name].params for option in [*param.opts, *param.secondary_opts]}
            assert set(options) <= known | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_whole_config_on_a_page_has_no_mistakes(page, tmp_path, monkeypatch):
    """A block is a whole config if it names a model (or makes one) and stages; a model's folder is made for it."""
    monkeypatch.chdir(tmp_path)
    for language, block in blocks(page):
        if language != "yaml" or "…" in block:
            continue
        root = yaml.safe_load(block)
        if isinstance(root, dict) and "stages" in root and ("model" in root or "init" in root["stages"]):
            if "@" not in root.get("model", "@"):
                Path(root["model"]).mkdir(parents=True, exist_ok=True)
            Path("x.yaml").write_text(block, encoding="utf-8")
            load_config(Path("x.yaml"))


def test_the_site_has_every_page():
    def named(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(named, entry.values() if isinstance(entry, dict) else entry))

    pages = {str(page.relative_to("docs")) for page in PAGES if page.is_relative_to("docs")}
    assert named(yaml.safe_load(text("mkdocs.yml"))["nav"]) == pages


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_stage_and_each_of_its_keys_is_named(kind):
    assert f"`{kind}`" in text("docs/config.md")
    assert f"`{kind}`" in text("README.md")
    told = "".join(map(text, KEYS))
    assert [key for key in find(kind).config.model_fields if f"`{key}`" not in told] == []


def test_every_key_of_a_data_set_is_named():
    filled_in = {"others"}  # by the pipeline
    missing = [key for key in Source.model_fields if key not in filled_in and f"`{key}`" not in text("docs/config.md")]
    assert missing == []


def test_pre_commit_runs_what_make_check_runs():
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)[1]
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    hooks = [hook for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == made
    assert {hook["language"] for hook in hooks} == {"system"}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_config_on_the_first_page_names_stages_that_exist(page):
    block = re.search(r"```yaml\n(.*?)```", text(page), re.DOTALL)[1]
    root = yaml.safe_load(block)
    assert set(root) <= {"model", "template", "data", "stages", "question"}
    assert set(root["stages"]) <= set(kinds())
    for settings in root["data"].values():
        Source(**settings)


def example(tmp_path):
    """The stage of docs/design/contract.md as a module."""
    code = re.search(r"```python\n(.*?)```", text("docs/design/contract.md"), re.DOTALL)[1]
    (tmp_path / "half.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("half", tmp_path / "half.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stage_in_the_docs_answers_the_contract(tmp_path):
    stage = example(tmp_path).STAGE
    assert isinstance(stage, Stage)
    assert list(stage.roles) == [("model",)]


@pytest.mark.train
def test_the_stage_in_the_docs_runs(tmp_path, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = example(tmp_path).STAGE
    folder = tiny("llama")
    out = tmp_path / "out"
    out.mkdir()
    metrics = stage.run(stage.config(model="m"), Inputs(model=[str(folder)]), out)
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stage.headline(metrics).endswith(" bytes")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype != before.get("dtype", "float32")
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(folder).chat_template
