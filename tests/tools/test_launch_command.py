"""`launch`: the resolved config plans to the same fingerprints, and the job files are those that a cluster takes."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import yaml

from pipeline.cli import main
from pipeline.plan import launching
from stages.model import device
from tests.planned import CHAIN, ROWS, TOP

TRICKY = """\
x-shared: &shared {learning_rate: 5e-5, num_train_epochs: 2}
question: "1e-5"                       # quoted: text
stages:
  init: {architecture: bloom, data: books}
  sft: {data: consult, lora: {}, trainer: {<<: *shared, max_length: 64}}
  second: {use: sft, data: {consult: 1.0}, lora: {r: 4, target_modules: [query_key_value]}, trainer: *shared}
  merge:
"""


@pytest.fixture
def launch(project, tmp_path):
    """Call `pipeline launch x.yaml` for a text; returns the exit code and what it printed."""

    def call(text, *words):
        project.write("x.yaml", text)
        code = main(["launch", "x.yaml", *words])
        shown = project.capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_the_resolved_config_needs_no_set_and_plans_to_the_same_fingerprints(launch, project, tmp_path):
    """Anchors, extensions, quoted numbers, empty mappings and empty stages all survive; where to meet does not."""
    text = TOP.replace("template: med\n", "template: med\nlaunch: {machines: 2, rank: 1, rendezvous: 10.0.0.1:29500}\n")
    text, given = (
        text + TRICKY,
        ["sft.trainer.learning_rate=2e-5", "question=no", "sft.trainer.max_grad_norm=.inf", "sft.launch.processes=4"],
    )
    sets = [word for assignment in given for word in ("--set", assignment)]
    assert launch(text, "--to", "slurm", "--print", *sets)[0] == 0
    written = (tmp_path / "x.resolved.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written)["launch"] == {"machines": 2}
    before, after = project.plan(text, *given), project.plan(written, name="x.resolved.yaml")
    assert {name: step.fingerprint for name, step in after.items()} == {
        name: step.fingerprint for name, step in before.items()
    }
    assert after["sft"].entry.launch.processes == 4
    assert main(["launch", "x.resolved.yaml", "--to", "slurm", "--print"]) == 0  # in its own place
    assert not (tmp_path / "x.resolved.resolved.yaml").exists()


def test_by_hand_the_address_of_the_config_stays_and_each_machine_has_its_line(launch, tmp_path):
    top = CHAIN + "launch: {machines: 2, processes: 4, rendezvous: 10.0.0.1:29500}\n"
    code, out, err = launch(top, "--to", "torchrun", "--until", "sft")
    assert (code, err) == (0, "")
    assert out.splitlines()[-6:] == [
        "wrote x.resolved.yaml",
        "wrote x.torchrun.sh",
        "type one line on each machine:",
        "  NODE_RANK=0 bash x.torchrun.sh",
        "  NODE_RANK=1 bash x.torchrun.sh",
        "logs: saves/x.resolved/logs/latest; status: pipeline status x.resolved.yaml",
    ]
    assert yaml.safe_load((tmp_path / "x.resolved.yaml").read_text())["launch"]["rendezvous"] == "10.0.0.1:29500"


def test_the_job_for_slurm_says_what_was_asked_for_and_passes_other_options_on(launch, tmp_path):
    words = ["--nodes", "2", "--gpus", "h100:8", "--time", "24:00:00", "--partition", "gpu", "--account", "med"]
    code, out, err = launch(CHAIN, "--to", "slurm", *words, "--print", "--", "--constraint=ib", "--mail-type=END")
    assert (code, err) == (0, "")
    lines = [line.removeprefix("#SBATCH ") for line in out.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "--job-name=x",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=h100:8",
        "--time=24:00:00",
        "--partition=gpu",
        "--account=med",
        "--requeue",
        "--signal=TERM@120",
        "--open-mode=append",
        "--output=saves/x.resolved/logs/slurm-%j.txt",
        "--constraint=ib",
        "--mail-type=END",
    ]
    assert out == (tmp_path / "x.slurm.sh").read_text(encoding="utf-8")
    assert (tmp_path / "saves" / "x.resolved" / "logs").is_dir()
    subprocess.run(["bash", "-n", "x.slurm.sh"], check=True, cwd=tmp_path)
    assert "gpus-per-node" not in launch(CHAIN, "--to", "slurm", "--gpus", "0", "--print")[1]


def test_srun_is_told_the_cores_that_sbatch_was_asked_for(launch, tmp_path, monkeypatch):
    """Slurm sets SLURM_CPUS_PER_TASK in a job with `--cpus-per-task`; srun reads SRUN_CPUS_PER_TASK."""
    assert "#SBATCH --cpus-per-task=8\n" in launch(CHAIN, "--to", "slurm", "--print", "--", "--cpus-per-task=8")[1]
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "cores: ${SRUN_CPUS_PER_TASK-not said}"\n')
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}{os.pathsep}{os.environ['PATH']}")
    for variables, cores in (({}, "not said"), ({"SLURM_CPUS_PER_TASK": "8"}, "8")):
        job = subprocess.run(
            ["bash", "x.slurm.sh"], cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, check=True
        )
        assert job.stdout.decode().splitlines()[0] == f"cores: {cores}"


def test_without_the_program_of_a_cluster_the_files_are_there_and_the_line_is_named(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(CHAIN, "--to", "slurm")[2] == (
        "--to slurm: there is no `sbatch` here; wrote x.resolved.yaml and x.slurm.sh; submit with `sbatch x.slurm.sh`\n"
    )
    code, _, err = launch(CHAIN, "--to", "sky", "--gpus", "H100:8")
    assert code == 2
    assert "submit with `sky launch --yes --detach-run x.sky.yaml`" in err


def test_the_answer_of_the_cluster_is_shown(launch, tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    for script, code, seen in (
        ('echo "Submitted batch job 7 of $1"', 0, "Submitted batch job 7 of x.slurm.sh"),
        ("echo invalid partition >&2; exit 1", 1, "error: `sbatch x.slurm.sh` was refused: invalid partition"),
    ):
        sbatch.write_text(f"#!/bin/sh\n{script}\n")
        sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
        done = launch(CHAIN, "--to", "slurm")
        assert (done[0], seen in done[1] + done[2]) == (code, True)


FOREIGN = "`--to {}` has no use for it; it is for {}"
REFUSED = {
    "--to slurn": "--to slurn: there is no such target; did you mean `slurm`?",
    "--to sky --time 1:00": f"--time: {FOREIGN.format('sky', '`--to slurm`')}",
    "--to torchrun --gpus 8": f"--gpus: {FOREIGN.format('torchrun', '`--to slurm` or `--to sky`')}",
    "--to sky --gpus 8": "--gpus 8: SkyPilot wants the kind of GPU as well, such as `H100:8`",
    "--to slurm --gpus x": "--gpus x: write their number on each machine, such as `8` or `H100:8`, or `0`",
    "--to slurm --partition a;b": "--partition a;b: it may hold letters, digits and `_.,:@+/=-` only",
    "--to sky -- --x": "--x: options after `--` are for sbatch, with `--to slurm`",
    "--to slurm x": "x: not an option of sbatch; after `--` write options such as `--constraint=h100`",
    "--to slurm --nodes 2 --until init": "--nodes 2: no stage would use them; only stages that train do, "
    "and those with a `launch` of their own follow that one",
    "--to slurm --set sft.trainer.lerning_rate=1": "--set sft.trainer.lerning_rate: stage `sft`: SFTConfig has no "
    "setting `lerning_rate`; did you mean `learning_rate`?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_meant_is_refused_before_a_file_is_written(launch, tmp_path, words):
    assert launch(CHAIN, *words.split()) == (2, "", f"{REFUSED[words]}\n")
    assert not (tmp_path / "x.resolved.yaml").exists()


def test_the_job_for_skypilot_names_the_config_as_the_machines_find_it(project, tmp_path, monkeypatch):
    """SkyPilot copies the current folder to the machines, under another name."""
    project.write("x.yaml", CHAIN)
    words = ["launch", str(tmp_path / "x.yaml"), "--to", "sky", "--print"]
    assert main([*words, "--saves", str(tmp_path / "saves")]) == 0
    run = yaml.safe_load((tmp_path / "x.sky.yaml").read_text(encoding="utf-8"))["run"]
    assert run.splitlines()[-1] == "exec pipeline run x.resolved.yaml --saves saves"
    project.capsys.readouterr()
    (tmp_path / "x.resolved.yaml").unlink()
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ROWS:
        shutil.copy(name, inner)
    monkeypatch.chdir(inner)
    assert main(["launch", "../x.yaml", "--to", "sky", "--print"]) == 2
    assert project.capsys.readouterr().err == (
        f"../x.yaml: SkyPilot copies only the current folder `{inner}` to the machines; "
        "call `launch` in a folder that has the config in it\n"
    )
    assert not (tmp_path / "x.resolved.yaml").exists()


def test_a_job_for_machines_with_gpus_is_checked_for_them_and_not_for_the_machine_that_submits_it(launch, monkeypatch):
    monkeypatch.setattr(device, "_gpus_here", lambda: 0)
    monkeypatch.setattr(launching, "find_spec", lambda name: name)
    top = "launch: {processes: 8, strategy: zero3, offload: optimizer}\n" + CHAIN
    for words in (["--gpus", "h100:8"], []):  # Slurm is asked for a GPU a process by default
        code, out, err = launch(top, "--to", "slurm", "--print", *words)
        assert (code, err) == (0, "")
        assert "--gpus-per-node=" in out
    refused = launch(top, "--to", "slurm", "--print", "--gpus", "4")
    assert refused[0] == 2
    assert "`processes` is 8, one for each GPU, and this machine has 4 GPUs" in refused[2]
    refused = launch(top, "--to", "slurm", "--print", "--gpus", "0")
    assert refused[0] == 2
    assert "`offload` moves from the memory of a GPU to main memory, and this machine has no GPU" in refused[2]


def test_a_file_of_the_user_is_not_overwritten(launch, tmp_path):
    (tmp_path / "x.resolved.yaml").write_text("mine: 1\n")
    code, _, err = launch(CHAIN, "--to", "slurm", "--print")
    assert (code, err) == (2, "x.resolved.yaml: is in the way of the file that `launch` writes; move it\n")


def test_the_script_for_one_machine_runs_the_config_and_keeps_each_attempt(launch, tmp_path):
    """The run is the script's own process, so its exit code and its signals are those of the script."""
    assert launch(CHAIN, "--to", "torchrun", "--set", "sft.data=no")[0] == 2
    assert launch(CHAIN, "--to", "torchrun")[0] == 0
    (tmp_path / "books.jsonl").unlink()  # so that the run ends at once, with exit code 2
    for attempt in ("attempt_1", "attempt_2"):
        done = subprocess.run(["bash", "x.torchrun.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
        logs = tmp_path / "saves" / "x.resolved" / "logs"
        assert (done.returncode, os.readlink(logs / "latest")) == (2, attempt)
        assert "books.jsonl" in done.stdout
        assert (logs / "latest" / "machine_0.txt").read_text() == done.stdout


SKY = os.environ.get("SKY_PYTHON") or (sys.executable if shutil.which("sky") else None)


@pytest.mark.skipif(SKY is None, reason="SkyPilot is not installed; SKY_PYTHON names the Python of its environment")
def test_skypilot_reads_the_task(launch, tmp_path):
    assert (
        launch(CHAIN, "--to", "sky", "--nodes", "2", "--gpus", "H100:8", "--image", "docker:nvidia/cuda", "--print")[0]
        == 0
    )
    code = (
        "import json, sky; task = sky.Task.from_yaml('x.sky.yaml'); (one,) = task.resources; "
        "print(json.dumps([task.num_nodes, one.accelerators, list(one.image_id.values()), "
        "one.job_recovery['recover_on_exit_codes']]))"
    )
    done = subprocess.run([SKY, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, {"H100": 8}, ["docker:nvidia/cuda"], [75]]
