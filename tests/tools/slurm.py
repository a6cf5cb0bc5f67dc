"""A real Slurm on this one machine: munge, slurmctld and slurmd with a small configuration; made and removed by root.

By hand: `.venv/bin/python tests/tools/slurm.py` submits the demo to it, sends it back into the queue in the middle, and
prints what the job has written.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.run.namespaces import reached  # noqa: E402 - the folder of the tests is no package of the installation

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no Slurm here; None if there can."""
    if os.geteuid() != 0:
        return "the daemons of Slurm need root"
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    return f"`{absent[0]}` is not installed (Debian: apt-get install slurm-wlm)" if absent else None


PATH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


class Cluster:
    """Calls Slurm's commands for this cluster."""

    def __init__(self, folder):
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words):
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def state(self, job):
        """The state of a job, such as RUNNING, and how often it was sent back into the queue."""
        shown = self.call("scontrol", "show", "job", job)
        words = dict(word.partition("=")[::2] for word in shown.split())
        return words["JobState"], int(words["Restarts"]), words["ExitCode"]

    def until(self, job, states, seconds=300):
        """Wait until a job is in one of these states; returns what `state` returns."""
        end = time.monotonic() + seconds
        while (found := self.state(job))[0] not in states and time.monotonic() < end:
            time.sleep(0.2)
        return found


@contextlib.contextmanager
def cluster():
    """A running cluster with one node."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as daemons:
        folder = Path(name)
        for inner, mode in (("munge", 0o711), ("state", 0o700), ("spool", 0o700)):
            (folder / inner).mkdir(mode=mode)
        folder.chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports, cores = [_free_port(), _free_port()], os.cpu_count()
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(host=host, ports=ports, folder=folder, cores=cores)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        made = Cluster(folder)
        munge = folder / "munge"
        files = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        for words in (
            ["munged", "--foreground", "--force", f"--key-file={key}", *files],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D"],
        ):
            with open(folder / f"{words[0]}.log", "wb") as log:
                daemon = subprocess.Popen(words, env=made.environment, stdout=log, stderr=log)
            daemons.callback(_end, daemon)
            time.sleep(1)
        end = time.monotonic() + 60
        while (state := _node_state(made)) != "idle":
            if time.monotonic() > end:
                logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in folder.glob("*.log"))
                raise TimeoutError(f"the node is {state}\n{logs}")
            time.sleep(0.5)
        try:
            yield made
        finally:
            made.call("scancel", "--user=root")
            end = time.monotonic() + 40
            while made.call("squeue", "--noheader") and time.monotonic() < end:
                time.sleep(0.5)


def _node_state(made):
    with contextlib.suppress(subprocess.CalledProcessError):
        return made.call("sinfo", "--noheader", "--format=%t")
    return "without a controller"


def _end(daemon):
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submit(made, config, saves, *words):
    """`pipeline launch` a config; returns the number of the job and what was printed."""
    program = [sys.executable, "-m", "pipeline.cli", "launch", str(config), "--saves", str(saves)]
    shown = made.call(*program, "--to", "slurm", "--gpus", "0", *words)
    return next(line for line in shown.splitlines() if line.startswith("Submitted")).split()[-1], shown


def main():
    config, saves = Path("configs/tiny.yaml"), Path(tempfile.mkdtemp()) / "saves"
    with cluster() as made:
        job, shown = submit(made, config, saves)
        print(shown)
        reached(saves, 20)
        print("$ scontrol requeue", job, "   # in the middle of a stage", made.call("scontrol", "requeue", job))
        print("job", job, *made.until(job, ("COMPLETED", "FAILED"), 3000))
        logs = saves / "tiny.resolved" / "logs"
        for file in [*logs.glob("slurm-*.txt"), *sorted(logs.glob("attempt_*/*.txt"))]:
            print(f"== {file.relative_to(logs)}", file.read_text(), sep="\n")
        print("latest →", os.readlink(logs / "latest"))
    for file in (config.with_name("tiny.resolved.yaml"), config.with_name("tiny.slurm.sh")):
        file.unlink()


if __name__ == "__main__":
    main()
