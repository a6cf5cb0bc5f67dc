"""Words on a command line in, an exit code and text out; and none of it waits for torch."""

import fcntl
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.commands.app import print_json
from pipeline.config import checker
from pipeline.config.checker import load_config
from pipeline.errors import ConfigError, GateClosed, StageFailed
from pipeline.plan import step as step_module
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.plan.step import Plan
from pipeline.saves import artifact
from pipeline.saves import links as links_module
from pipeline.saves.links import BELONGS
from pipeline.saves.locks import held_file
from pipeline.views import survey
from stages.runtime.hashes import Hashes
from stages.training.checkpoint import seal

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*.yaml"))
PANELS = {
    "Start": ["init", "convert", "schema"],
    "Run": ["run", "plan", "validate", "launch"],
    "Use": ["chat", "predict", "serve", "push"],
    "Inspect": ["data", "status", "report", "diff", "doctor"],
    "Clean up": ["gc"],
}
COMMANDS = typer.main.get_command(app).commands
HEAVY = ["torch", "transformers", "trl", "peft", "datasets", "gptqmodel", "accelerate", "optimum", "pandas"]
CONFIG = """\
data:
  books: {path: books.jsonl, format: text}
stages:
  init: {architecture: bloom, data: books}
  pt: {data: books, lora: {r: 8}}
  merge:
"""
TWO_STAGES = """\
stages:
  sft: {data: consult}
  second: {use: dpo, data: prefer}
  judge: {use: evaluate, data: held}
"""


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """A folder with `x.yaml` and its data; returns a way to call: exit code, output, error output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "x.yaml").write_text(CONFIG, encoding="utf-8")

    def call(*words):
        try:
            code = main(words)
        except SystemExit as leave:  # `--show-completion`
            code = leave.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def folders():
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    return {step.name: step for step in planned.steps}


def pretend(step):
    """Leave what a run of this step leaves."""
    step.part.mkdir(parents=True)
    (step.part / "model.safetensors").write_bytes(b"weights")
    record = {"recipe": dict(step.recipe), "versions": installed_versions(step.use), "started": 0.0}
    artifact.finish(step.part, step.folder, record, Hashes(None))
    links_module.link(step.folder, step.link)


def test_no_command_that_only_looks_imports_a_training_library(project):
    code = f"""
import json, sys
from pipeline.cli import main
from pipeline.plan.estimate_engine import Engine

Engine._asked = lambda *_: None  # the process that estimates memory does load them
found = {{}}
alone = [[name, "x.yaml"] for name in ("validate", "plan", "report")]
for words in (["--help"], ["status"], ["status", "x.yaml", "--json"], *alone):
    try:
        code = main(words)
    except SystemExit as leave:
        code = leave.code
    found[" ".join(words)] = [code, [name for name in {HEAVY} if name in sys.modules]]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    commands = ["--help", "status", "status x.yaml --json", "validate x.yaml", "plan x.yaml", "report x.yaml"]
    assert found == {command: [0, []] for command in commands}


def test_the_command_line_needs_no_large_library():
    """`--help` shows text and checks nothing, so it needs neither pydantic nor YAML; without it, nor rich."""
    code = f"""
import json, sys
import pipeline.cli

light = [name for name in {[*HEAVY, "pydantic", "yaml", "rich"]} if name in sys.modules]
pipeline.cli.main(["--help"])
print(json.dumps([light, [name for name in {[*HEAVY, "pydantic", "yaml"]} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]


def shown_help(*words):
    """The lines of a help page at 80 columns, without colours."""
    result = CliRunner().invoke(app, [*words], prog_name="pipeline", env={"COLUMNS": "80"}, catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    return re.sub(r"\x1b\[[\d;]*m", "", result.stdout).splitlines()


def test_help_names_every_command():
    panels, panel = {}, ""
    for line in shown_help("--help"):
        if line.startswith("╭"):
            panel = line.strip("╭─╮ ")
        elif name := re.match(r"│ ([a-z]+) ", line):
            panels.setdefault(panel, []).append(name[1])
    assert panels == PANELS
    assert sorted(COMMANDS) == sorted(command for commands in PANELS.values() for command in commands)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command):
    words = [command] if command else []
    lines = shown_help(*words, "--help")
    assert max(map(len, lines)) == 80
    assert not [line for line in lines if "…" in line]
    assert lines == shown_help(*words, "-h")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_works(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [line.strip() for line in shown_help(command, "--help") if "Example: " in line]
    program, name, *words = shlex.split(example.removeprefix("Example: "))
    assert (program, name) == ("pipeline", command)
    found = COMMANDS[command].make_context(command, words).params
    if "config" in found:
        config = load_config(found["config"], found.get("assignments") or ())
        assert found.get("until") in (None, *(stage.name for stage in config.stages))
        assert found.get("name") in (None, *config.data)


def test_version(project):
    assert re.fullmatch(r"stagewise \d+\.\d+\.\d+\n", project("--version")[1])
    assert (project("--version")[0], project("--version")[2]) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "",
            "a command is missing, such as `run` in `pipeline run configs/tiny.yaml`; `pipeline --help` shows them all",
        ),
        ("--verbose", "`pipeline` has no option `--verbose`; `pipeline --help` shows them all"),
        ("--json plan x.yaml", "`--json` goes after the command: write `pipeline plan x.yaml --json`"),
        # a word that is not a command
        ("trian x.yaml", "`trian` is not a command: write `pipeline run x.yaml`"),
        ("train x.yaml --fresh pt", "`train` is not a command: write `pipeline run x.yaml --fresh pt`"),
        ("vaildate x.yaml", "`vaildate` is not a command: write `pipeline validate x.yaml`"),
        ("clean --yes", "`clean` is not a command: write `pipeline gc --yes`"),
        ("help run", "`help` is not a command: write `pipeline --help`"),
        ("x.yaml", "`x.yaml` is a config, not a command: write `pipeline run x.yaml`"),
        ("x.yaml --until pt", "`x.yaml` is a config, not a command: write `pipeline run x.yaml --until pt`"),
        (
            "--config x.yaml",
            "`x.yaml` is a config, not a command; the config is an argument: write `pipeline run x.yaml`",
        ),
        ("sft x.yaml", "`sft` is a stage, not a command: write `pipeline run x.yaml --until sft`"),
        ("evaluate x.yaml", "`evaluate` is a stage, not a command: write `pipeline run x.yaml --until evaluate`"),
        ("eval y.yaml", "`eval` is not a command, but `judge` is a stage: write `pipeline run y.yaml --until judge`"),
        ("second y.yaml", "`second` is a stage, not a command: write `pipeline run y.yaml --until second`"),
        (
            "frobnicate x.yaml",
            "`frobnicate` is not a command; `pipeline --help` shows them all",
        ),
        # what is missing or too many
        ("plan", "CONFIG is missing: write `pipeline plan configs/tiny.yaml`"),
        ("train", "`train` is not a command; CONFIG is missing: write `pipeline run configs/tiny.yaml`"),
        ("diff a", "B is missing: write `pipeline diff a B`"),
        ("run x.yaml z.yaml", "`z.yaml` is one argument too many: write `pipeline run x.yaml`"),
        ("gc x.yaml", "`x.yaml` is one argument too many: write `pipeline gc`"),
        ("run -- x.yaml z.yaml", "`z.yaml` is one argument too many: write `pipeline run x.yaml`"),
        ("run x.yaml pt", "`pt` is a stage: write `pipeline run x.yaml --until pt`"),
        ("run x.yaml --set", "`--set` needs a value: write `pipeline run x.yaml --set KEY.PATH=VALUE`"),
        (
            "run x.yaml --set sft.seed 7",
            "`--set sft.seed` needs `=` before `7`: write `pipeline run x.yaml --set sft.seed=7`",
        ),
        ("run x.yaml --saves --json", "`--saves` needs a value: write `pipeline run x.yaml --saves DIR --json`"),
        ("plan x.yaml --json=yes", "`--json` takes no value: write `pipeline plan x.yaml --json`"),
        # the config as an option
        ("run --config x.yaml", "the config is an argument: write `pipeline run x.yaml`"),
        ("plan -c x.yaml --until pt", "the config is an argument: write `pipeline plan x.yaml --until pt`"),
        ("validate --config_file=x.yaml", "the config is an argument: write `pipeline validate x.yaml`"),
        ("status --config x.yaml", "the config is an argument: write `pipeline status x.yaml`"),
        # settings as options
        (
            "run x.yaml --max_steps 3",
            "`--max_steps` is a setting of stage `pt` and needs `--set`: "
            "write `pipeline run x.yaml --set pt.trainer.max_steps=3`",
        ),
        (
            "run x.yaml --learning_rate=2e-5",
            "`--learning_rate` is a setting of stage `pt` and needs `--set`: "
            "write `pipeline run x.yaml --set pt.trainer.learning_rate=2e-5`",
        ),
        (
            "run y.yaml --max-steps 3 --lr=2e-5 --bf16 --json",
            "`--max-steps`, `--lr`, `--bf16` are settings of stages `sft`, `second` and need `--set`: "
            "write `pipeline run y.yaml --json --set sft.trainer.max_steps=3 --set sft.trainer.learning_rate=2e-5 "
            "--set sft.trainer.bf16=true`",
        ),
        (
            "plan --beta 0.2 y.yaml",
            "`--beta` is a setting of stage `second` and needs `--set`: "
            "write `pipeline plan y.yaml --set second.trainer.beta=0.2`",
        ),
        (
            "run y.yaml --lora_rank 4 --eval_size 0.1",
            "`--lora_rank`, `--eval_size` are settings of stages `sft`, `second` and need `--set`: "
            "write `pipeline run y.yaml --set sft.lora.r=4 --set sft.eval_size=0.1`",
        ),
        (
            "run no.yaml --max_steps 3",
            "`--max_steps` is a setting of stage `sft` and needs `--set`: "
            "write `pipeline run no.yaml --set sft.trainer.max_steps=3`",
        ),
        (
            "run --seed 3 x.yaml",
            "`--seed` is a setting of the config and needs `--set`: write `pipeline run x.yaml --set seed=3`",
        ),
        (
            "train --config x.yaml --max_steps 3",
            "`train` is not a command; the config is an argument; `--max_steps` is a setting of stage `pt` and needs "
            "`--set`: write `pipeline run x.yaml --set pt.trainer.max_steps=3`",
        ),
        ("run x.yaml --output_dir out", "outputs go to `--saves`: write `pipeline run x.yaml --saves out`"),
        (
            "run x.yaml --push_to_hub",
            "`pipeline run` has no option `--push_to_hub`, and `push_to_hub` is left to you (the pipeline uploads "
            "nothing); remove it",
        ),
        (
            "run x.yaml --max_stepz 3",
            "`pipeline run` has no option `--max_stepz`, and SFTConfig has no setting `max_stepz`; "
            "did you mean `max_steps`?",
        ),
        # Hydra's way
        (
            "run x.yaml pt.trainer.max_steps=3",
            "`pt.trainer.max_steps=3` needs `--set`: write `pipeline run x.yaml --set pt.trainer.max_steps=3`",
        ),
        (
            "run x.yaml --pt.trainer.max_steps 3",
            "`pt.trainer.max_steps=3` needs `--set`: write `pipeline run x.yaml --set pt.trainer.max_steps=3`",
        ),
        (
            "run x.yaml pt.max_steps=3 --stages.pt.lora.r=4",
            "`pt.max_steps=3` needs `--set`; `stages.pt.lora.r=4` needs `--set`: write `pipeline run x.yaml --set "
            "pt.trainer.max_steps=3 --set pt.lora.r=4`",
        ),
        (
            "run x.yaml trainer.max_steps=3",
            "`trainer.max_steps=3` needs `--set`: write `pipeline run x.yaml --set pt.trainer.max_steps=3`",
        ),
        (
            "data x.yaml pt.trainer.max_steps=3",
            "`pt.trainer.max_steps=3` needs `--set`: write `pipeline data x.yaml --set pt.trainer.max_steps=3`",
        ),
        (
            "run seed=3",
            "CONFIG is missing; `seed` is a setting of the config and needs `--set`: "
            "write `pipeline run configs/tiny.yaml --set seed=3`",
        ),
        (
            "plan x.yaml max_steps=3 --set seed=2",
            "`max_steps` is a setting of stage `pt` and needs `--set`: "
            "write `pipeline plan x.yaml --set seed=2 --set pt.trainer.max_steps=3`",
        ),
        # slips
        ("plan x.yaml --sets a=1", "`pipeline plan` has no option `--sets`; did you mean `--set`?"),
        ("run x.yaml --untill pt", "`pipeline run` has no option `--untill`; did you mean `--until`?"),
        ("run x.yaml --ignore_gates", "`pipeline run` has no option `--ignore_gates`; did you mean `--ignore-gates`?"),
        ("status --max_steps 3", "`pipeline status` has no option `--max_steps`; there is `--json`, `--saves`"),
        (
            "data x.yaml --rows few",
            "Invalid value for '--rows': Input should be a valid integer, unable to parse string as an integer",
        ),
        ("data x.yaml --rows -1", "Invalid value for '--rows': Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(project, words, expected):
    Path("y.yaml").write_text(TWO_STAGES, encoding="utf-8")
    code, out, err = project(*words.split())
    assert (code, out, err) == (2, "", f"error: {expected}\n")
    assert not Path("saves").exists()


@pytest.mark.parametrize(("dropped", "command"), [(0, "plan"), (0.5, "plan"), (0.5, "validate")])
def test_a_row_cannot_send_escapes_to_the_terminal(project, dropped, command):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    Path("rows.jsonl").write_text(good + '{"messages": [{"role": "\\u001b[31m"}]}\n', encoding="utf-8")
    data = f"data: {{d: {{path: rows.jsonl, format: messages, max_dropped: {dropped}}}}}\n"
    Path("e.yaml").write_text(
        data + "template: plain\nstages:\n  init: {architecture: bloom, data: d}\n  sft: {data: d}\n", encoding="utf-8"
    )
    _, out, err = project(command, "e.yaml")
    assert "\\x1b[31m" in out + err
    assert "\x1b" not in out + err


def test_a_run_or_data_may_be_called_like_an_argument(project):
    assert project("diff", "x", "b", "--saves", "s")[2].splitlines()[0].startswith("x: there is no run of this name")
    assert project("data", "x.yaml", "name", "--rows", "1")[2].startswith("there is no data `name`")


@pytest.mark.parametrize("words", ["plan x.yaml --max_steps 3", "plan -c x.yaml", "plan x.yaml pt.seed=3 --bf16 --r 4"])
def test_the_line_that_an_error_names_works(project, words):
    err = project(*words.split())[2]
    (line,) = re.findall("write `pipeline (.+)`", err)
    assert project(*shlex.split(line))[::2] == (0, "")


def test_a_word_is_quoted_where_the_shell_needs_it(project):
    expected = "error: `pt.lora={r: 4}` needs `--set`: write `pipeline plan x.yaml --set 'pt.lora={r: 4}'`\n"
    assert project("plan", "x.yaml", "pt.lora={r: 4}") == (2, "", expected)


def test_a_config_with_an_equals_sign_in_its_name_is_a_config(project):
    shutil.copy("x.yaml", "lr=3.yaml")
    assert project("plan", "lr=3.yaml", "--json")[0] == 0
    expected = "lr=4.yaml: cannot be read (No such file or directory); did you mean `lr=3.yaml`?\n"
    assert project("plan", "lr=4.yaml") == (2, "", expected)


def completions(words):
    """What bash offers for the last word."""
    env = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_PIPELINE_COMPLETE": "complete_bash"}
    return CliRunner().invoke(app, [], prog_name="pipeline", env=env, catch_exceptions=False).stdout.split()


def test_the_shell_completes_commands_options_and_stages(project):
    assert completions("pipeline ") == [command for commands in PANELS.values() for command in commands]
    assert completions("pipeline run x.yaml --un") == ["--until"]
    assert completions("pipeline run x.yaml --until ") == ["init", "pt", "merge"]
    assert completions("pipeline plan --json x.yaml --fresh m") == ["merge"]
    assert completions("pipeline plan no.yaml --fresh m") == []
    assert completions("pipeline run x.yaml --until --sa") == ["--saves"]


def test_the_completion_script_is_shown_for_bash(project, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # it goes by the process above: pytest
    code, out, err = project("--show-completion", "bash")
    assert (code, err) == (0, "")
    assert "_PIPELINE_COMPLETE=complete_bash" in out
    assert "complete -o default -F _pipeline_completion pipeline" in out.splitlines()


def test_the_completion_is_installed(project, monkeypatch, tmp_path):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = project("--install-completion", "bash")
    script = tmp_path / ".bash_completions" / "pipeline.sh"
    assert (code, err) == (0, "")
    assert out.startswith(f"bash completion installed in {script}\n")
    assert "_pipeline_completion" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_that_is_shipped_validates_and_plans(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    saves = ["--saves", str(tmp_path)]
    assert main(["validate", str(path), *saves]) == 0
    assert capsys.readouterr().out.endswith("; no problem found\n")
    assert main(["plan", str(path), *saves, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["stage"] for step in steps] == [stage.name for stage in load_config(path).stages]


def test_there_are_configs():
    assert Path("configs/tiny.yaml") in CONFIGS


def test_validate_says_what_was_found(project):
    found = "x.yaml: 3 stages (init → pt → merge); books 1 rows; no problem found\n"
    assert project("validate", "x.yaml") == (0, found, "")
    found = "x.yaml: 2 stages (init → pt); books 1 rows; no problem found\n"
    assert project("validate", "x.yaml", "--until", "pt") == (0, found, "")


def test_validate_writes_json(project):
    code, out, err = project("validate", "x.yaml", "--json")
    assert (code, json.loads(out), err) == (
        0,
        {"stages": ["init", "pt", "merge"], "rows": {"books": 1}, "notes": []},
        "",
    )


def test_plan_shows_each_stage_what_will_happen_why_and_where(project):
    steps = folders()
    pretend(steps["init"])
    code, out, err = project("plan", "x.yaml")
    assert (code, err) == (0, "")
    assert [line.split("  ") for line in squeezed(out)] == [
        ["stage", "plan", "why", "folder"],
        ["init", "done", "nothing it depends on has changed", str(steps["init"].folder)],
        ["pt", "will run", "has not run yet", str(steps["pt"].folder)],
        ["merge", "will run", "has not run yet", str(steps["merge"].folder)],
    ]


def squeezed(table):
    """The lines of a table with two spaces between its columns."""
    return [re.sub(" {2,}", "  ", line.strip()) for line in table.splitlines()]


def test_plan_writes_json(project):
    steps = folders()
    code, out, err = project("plan", "x.yaml", "--json", "--until", "pt")
    found = json.loads(out)
    assert (code, err, found["rows"], found["notes"]) == (0, "", {"books": 1}, [])
    assert found["steps"] == [
        {
            "stage": name,
            "use": name,
            "state": "run",
            "why": "has not run yet",
            "folder": str(steps[name].folder),
            "fingerprint": steps[name].fingerprint,
            "recipe": dict(steps[name].recipe),
            "inputs": dict(steps[name].identities),
        }
        for name in ("init", "pt")
    ]
    assert found["steps"][1]["inputs"] == {"model": steps["init"].fingerprint}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x.yaml", "--until", "mrege"], "--until mrege: there is no such stage; did you mean `merge`?\n"),
        (
            ["x.yaml", "--until", "zzz"],
            "--until zzz: there is no such stage; there is `init`, `merge`, `pt`\n",
        ),
        (["y.yaml"], "y.yaml: cannot be read (No such file or directory); there is `x.yaml`\n"),
        (["."], ".: cannot be read (Is a directory); there is `x.yaml`\n"),
        (["x.yaml", "--set", "pt"], "--set pt: write it as `--set key.path=value`\n"),
        (
            ["x.yaml", "--set", "pt.data=bookz", "--set", "pt.lora.ranks=8"],
            "--set pt.data: stage `pt`: no data `bookz` is declared; did you mean `books`?\n"
            "--set pt.lora.ranks: stage `pt`: LoraConfig has no setting `ranks`\n"
            "2 problems; nothing was run\n",
        ),
        (
            ["x.yaml", "--saves", "books.jsonl"],
            "books.jsonl: cannot be written; choose another folder with `--saves DIR`\n",
        ),
    ],
)
def test_a_mistake_ends_every_command_with_exit_code_2_and_no_traceback(project, command, words, expected):
    assert project(command, *words) == (2, "", expected)


def test_yaml_files_that_are_no_configs_are_not_offered(project):
    for name in (".pre-commit-config.yaml", "mkdocs.yml"):
        Path(name).write_text("repos: {stages: 1}\n")
    assert project("plan", "nothere.yaml")[
        2
    ] == "nothere.yaml: cannot be read (No such file or directory); there is " + ("`x.yaml`\n")
    assert (
        project("plan", "mkdoc.yml")[2] == "mkdoc.yml: cannot be read (No such file or directory); there is `x.yaml`\n"
    )


def test_a_folder_without_yaml_files_offers_none(project, tmp_path):
    expected = "no/x.yaml: cannot be read (No such file or directory)\n"
    assert project("plan", "no/x.yaml") == (2, "", expected)


@pytest.mark.parametrize("saves", ["saves", "no/such/folder"])
def test_status_of_nothing_says_how_to_begin(project, saves):
    expected = f"nothing in {saves} yet; `pipeline run CONFIG` fills it\n"
    assert project("status", "--saves", saves) == (0, expected, "")
    assert project("status", "--saves", saves, "--json") == (0, "[]\n", "")


def test_status_shows_what_is_done_damaged_and_unfinished(project):
    steps = folders()
    for name in ("init", "pt"):
        pretend(steps[name])
    (steps["pt"].folder / "model.safetensors").unlink()
    begin(steps["merge"])
    code, out, err = project("status", "--json")
    rows = [(row["config"], row["stage"], row["state"], row["folder"]) for row in json.loads(out)]
    assert (code, err) == (0, "")
    assert rows == [
        ("x", "init", "done", str(steps["init"].folder.resolve())),
        ("x", "pt", "damaged: `model.safetensors` is missing", str(steps["pt"].folder.resolve())),
        ("x", "merge", "stopped before its first checkpoint", str(steps["merge"].part)),
    ]
    shutil.rmtree(steps["pt"].folder)
    code, out, err = project("status", "x.yaml", "--json")
    assert [row["state"] for row in json.loads(out)] == ["done", "gone", "stopped before its first checkpoint"]
    code, out, err = project("status")
    assert [line.split("  ")[:2] for line in squeezed(out) if "  " in line] == [  # a long folder goes on below
        ["config", "stage"],
        ["x", "init"],
        ["x", "pt"],
        ["x", "merge"],
    ]


def begin(step, *, of="x", reached=None):
    """Leave what a run of this step leaves that was killed, with a checkpoint at step `reached` of 12."""
    step.part.mkdir(parents=True)
    spec = {**step_module.begin(step, Plan(load_config(Path("x.yaml")), Path("saves"), Hashes(None))), "of": of}
    (step.part / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    if reached:
        checkpoint = step.part / "checkpoints" / f"checkpoint-{reached}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"max_steps": 12}', encoding="utf-8")
        seal(checkpoint)


@pytest.fixture
def held():
    """Hold the locks of a step as a run does."""
    files = []

    def hold(step, name="runner", kind=fcntl.LOCK_EX):
        path = held_file(step.part)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_suffix(f".{name}"), "w", encoding="utf-8")  # noqa: SIM115
        file.write("pid 12 on a-host since 2026-11-22 10:00:00\n")
        file.flush()
        fcntl.flock(file, kind)
        files.append(file)

    yield hold
    for file in files:
        file.close()


def test_status_tells_running_from_stopped(project, held):
    step = folders()["pt"]
    begin(step, reached=5)

    def state():
        return json.loads(project("status", "--json")[1])[0]["state"]

    assert state() == "stopped, goes on at step 5 of 12"
    held(step)
    assert state() == "running, pid 12 on a-host since 2026-11-22 10:00:00"
    events = ['{"kind": "total", "steps": 12, "step": 5}', '{"kind": "step", "step": 7}', '{"kind": "step", "st']
    (step.part / "events.jsonl").write_text("\n".join(events), encoding="utf-8")
    assert state() == "running, step 7 of 12, pid 12 on a-host since 2026-11-22 10:00:00"


def test_looking_at_a_running_stage_does_not_take_its_lock(project, held):
    step = folders()["pt"]
    begin(step)
    held(step, "worker", fcntl.LOCK_SH)
    assert json.loads(project("status", "--json")[1])[0]["state"].startswith("running, ")
    held(step)  # would wait for ever if `status` had kept it


def gc(project, *words):
    """What `gc` did to each folder, by its name."""
    code, out, err = project("gc", "--json", *words)
    assert (code, err) == (0, "")
    return {Path(row["folder"]).name: (row["why"], row["removed"]) for row in json.loads(out)}


@pytest.fixture
def ran(project):
    """The project after a run of its config."""
    for step in folders().values():
        pretend(step)
    links = Path("saves/x")
    (links / BELONGS).write_text('{"config": "../../x.yaml"}', encoding="utf-8")
    return folders()


def test_gc_leaves_what_a_config_refers_to(project, ran):
    assert gc(project, "--yes") == {}
    assert project("gc") == (0, "everything in saves is in use\n", "")


def test_gc_removes_what_an_edited_config_left_behind(project, ran):
    Path("x.yaml").write_text(CONFIG.replace("r: 8", "r: 4"), encoding="utf-8")
    for name, step in folders().items():
        if name != "init":
            pretend(step)
    why = "no config refers to it"
    expected = {ran[name].folder.name: why for name in ("merge", "pt")}
    assert gc(project) == {name: (why, False) for name, why in expected.items()}
    assert ran["pt"].folder.is_dir()
    assert gc(project, "--yes") == {name: (why, True) for name, why in expected.items()}
    assert not ran["pt"].folder.exists()
    assert all(step.state == "done" for step in folders().values())


def test_gc_removes_all_of_a_config_that_is_gone(project, ran):
    Path("x.yaml").unlink()
    found = gc(project, "--yes")
    assert found.pop("x") == ("links of `x.yaml`, which is gone", True)
    assert found == {step.folder.name: ("no config refers to it", True) for step in ran.values()}
    assert not [path for path in Path("saves").iterdir() if not path.name.startswith(".")]


def test_gc_keeps_what_a_folder_it_keeps_stands_on(project, ran):
    """An adapter is nothing without its base, also when no link points to the base any more."""
    (Path("saves/x") / ".config.json").unlink(missing_ok=True)  # so that only its links tell what it needs
    (Path("saves/x") / "init").unlink()
    (Path("saves/x") / "merge").unlink()
    record = json.loads((ran["pt"].folder / "record.json").read_text(encoding="utf-8"))
    record["model"] = ran["pt"].produces
    (ran["pt"].folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert set(gc(project, "--yes")) == {ran["merge"].folder.name}
    assert ran["init"].folder.is_dir()


def test_gc_keeps_unfinished_work_until_it_is_given_up(project):
    steps = folders()
    begin(steps["pt"], reached=5)
    begin(steps["merge"], of=None)
    assert gc(project, "--yes") == {steps["merge"].part.name: ("unfinished, and no config resumes it", True)}
    assert steps["pt"].part.is_dir()


def test_gc_never_touches_a_running_stage_nor_what_it_starts_from(project, held):
    steps = folders()
    pretend(steps["init"])
    Path("saves/x/init").unlink()
    begin(steps["pt"], of=None)
    held(steps["pt"])
    assert gc(project, "--yes") == {}
    assert steps["pt"].part.is_dir()
    assert steps["init"].folder.is_dir()


def test_gc_does_not_remove_what_a_run_has_just_taken(project, held):
    step = folders()["pt"]
    begin(step, of=None)
    ((leftover,), _) = survey.find_leftovers(Path("saves"))
    held(step)
    assert not survey.remove(leftover)
    assert step.part.is_dir()


def test_gc_removes_what_was_set_aside(project, ran):
    ran["pt"].folder.rename(ran["pt"].folder.with_name(f"{ran['pt'].folder.name}.old-1"))
    found = gc(project, "--yes")
    assert found == {f"{ran['pt'].folder.name}.old-1": ("set aside: it was damaged, or rebuilt with `--fresh`", True)}


def test_gc_knows_a_config_through_a_link_to_saves_and_after_saves_moved(project, ran, tmp_path):
    for link in Path("saves/x").iterdir():
        if link.is_symlink():
            assert link.exists()
    (Path("saves/x") / BELONGS).write_text(
        json.dumps({"config": "../../x.yaml", "absolute": str(tmp_path / "x.yaml")}), encoding="utf-8"
    )
    Path("deep/er").mkdir(parents=True)
    Path("saves").rename("deep/er/kept")
    assert gc(project, "--yes", "--saves", "deep/er/kept") == {}
    Path("link").symlink_to(Path("deep/er/kept").resolve())
    assert gc(project, "--yes", "--saves", "link") == {}
    assert (Path("deep/er/kept") / ran["pt"].folder.name).is_dir()


def test_gc_keeps_the_rows_that_an_unfinished_stage_reads(project, ran):
    """They were selected by settings that no config has any more."""
    rows = ran["init"].folder.with_name("select-0123456789ab")
    rows.mkdir()
    begin(ran["merge"], of="x")
    spec = ran["merge"].part / "spec.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "stands_on": [rows.name]}), encoding="utf-8")
    assert gc(project, "--yes") == {}
    shutil.rmtree(ran["merge"].part)
    assert set(gc(project, "--yes")) == {rows.name}


def test_gc_takes_the_end_of_input_for_a_no(project, ran, monkeypatch):
    def ended(question):
        raise EOFError

    Path("x.yaml").unlink()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", ended)
    code, out, err = project("gc")
    assert (code, err) == (0, "")
    assert out.endswith("nothing was removed\n")


def test_gc_leaves_alone_what_it_does_not_know(project, ran):
    (Path("saves") / "notes").mkdir()
    (Path("saves") / "sft-mine").mkdir()
    assert gc(project, "--yes") == {}


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False), ("no", False)])
def test_gc_asks_first(project, ran, monkeypatch, answer, removed):
    Path("x.yaml").unlink()
    asked = []
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    code, out, err = project("gc")
    assert (code, err, len(asked)) == (0, "", 1)
    assert asked[0].startswith("remove these 4, ")
    assert asked[0].endswith("? [y/N] ")
    assert ran["pt"].folder.exists() != removed
    assert ("removed 4 of 4, " in out) == removed


def test_gc_removes_nothing_when_nobody_can_be_asked(project, ran):
    Path("x.yaml").unlink()
    code, out, err = project("gc")
    assert (code, err) == (0, "")
    assert out.endswith("`--yes` removes them without asking\nnothing was removed\n")
    assert ran["pt"].folder.is_dir()


def test_an_interrupted_command_is_exit_code_75(project, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(checker, "load_config", interrupted)
    assert project("plan", "x.yaml") == (75, "", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (StageFailed("stage `pt` failed"), 1, "error: stage `pt` failed\n"),
        (GateClosed("gate failed"), 3, "error: gate failed\n"),
        (
            ConfigError(["x.yaml:1:1: a", "x.yaml:2:1: b"]),
            2,
            "x.yaml:1:1: a\nx.yaml:2:1: b\n2 problems; nothing was run\n",
        ),
        (OSError(28, "No space"), 1, "error: the disk is full; free space and run again, what was finished is kept\n"),
    ],
)
def test_an_error_ends_in_its_message_and_its_exit_code(project, monkeypatch, error, code, shown):
    def failed(*words):
        raise error

    monkeypatch.setattr(checker, "load_config", failed)
    assert project("plan", "x.yaml") == (code, "", shown)
    result = CliRunner().invoke(app, ["plan", "x.yaml"], prog_name="pipeline")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", shown)


def test_a_reader_that_left_is_no_error(project, monkeypatch):
    def left(*words):
        raise BrokenPipeError

    stream = io.StringIO()
    monkeypatch.setattr(checker, "load_config", left)
    monkeypatch.setattr("sys.stderr", stream)
    assert main(["plan", "x.yaml"]) == 1
    assert stream.closed  # or Python would complain at its end


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(5, "Input/output error"), EOFError()], ids=repr)
def test_a_fault_of_ours_shows_its_traceback(project, error):
    code = f"""
import sys
from pipeline.cli import main
from pipeline.config import checker

def load_config(*words):
    raise {error!r}

checker.load_config = load_config
sys.exit(main(["plan", "x.yaml"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.lstrip().startswith("Traceback (most recent call last):\n")
    assert f'File "{ROOT / "pipeline" / "commands" / "app.py"}"' in done.stderr
    assert repr(error).partition("(")[0] in done.stderr


def test_a_figure_that_is_no_number_is_null_in_json(project, capsys):
    print_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}, indent=None)
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": {"c": null}}\n'
