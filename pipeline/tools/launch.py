"""A config in, a job out: a resolved config, and a short job file for Slurm, for SkyPilot or to start by hand.

The resolved config has the values of `--set` in it, and is all that `pipeline run` needs. The job files are made from
the files in `templates/`; each calls `pipeline run` once on every machine, with the same words.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config.document import parse, read
from pipeline.config.pipeline import Launch, folder_name
from pipeline.errors import ConfigError
from pipeline.plan.step import Plan
from pipeline.tools.convert_yaml import scalar
from stages.runtime.errors import StageError, nearest

Target = Literal["slurm", "sky", "torchrun"]
TEMPLATES: Mapping[Target, str] = {"slurm": "slurm.sh.jinja", "sky": "sky.yaml.jinja", "torchrun": "torchrun.sh.jinja"}
SUBMIT: Mapping[Target, Sequence[str]] = {"slurm": ("sbatch",), "sky": ("sky", "launch", "--yes", "--detach-run")}
"""The command that takes a job file; the lines for torchrun are typed on each machine."""
TAKES: Mapping[Target, Sequence[str]] = {
    "slurm": ("gpus", "time", "partition", "account"),
    "sky": ("gpus", "image"),
    "torchrun": (),
}
MARK = "# Written by `pipeline launch"
LOGS = "logs"
"""In the config's folder of links: a folder `attempt_N` for each start of the job, and a link `latest`."""
_WORD = re.compile(r"[\w.,:@+/=-]+\Z")
_GPUS = re.compile(r"(?:[A-Za-z][\w-]*:)?[0-9]+\Z")


@dataclass(frozen=True)
class Wishes:
    """What a job asks of the cluster; None is left to the config or to the cluster."""

    nodes: int | None = None
    """The machines that the config was told to use; None where the config alone says it."""
    gpus: str | None = None
    """Of each machine: `8`, or with the kind of GPU `H100:8`; `0` for none."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    image: str | None = None
    extra: Sequence[str] = ()
    """Options of sbatch that are written as they are."""


@dataclass(frozen=True)
class Job:
    """A job that is written, and how to start it."""

    target: Target
    resolved: Path
    file: Path
    logs: Path
    text: str
    """Of the job file."""
    lines: Sequence[str]
    """What to type to start it; one line for each machine where no cluster starts the machines."""
    notes: Sequence[str]


def target(word: str) -> Target:
    """The target of a job by its name.

    Raises:
        ConfigError: there is no such target.
    """
    found = next((one for one in TEMPLATES if one == word), None)
    if found is None:
        raise ConfigError([f"--to {word}: there is no such target{nearest(word, TEMPLATES)}"])
    return found


def check_wishes(target: Target, wishes: Wishes) -> None:
    """
    Raises:
        ConfigError: an option means nothing to the target, or has a form that the target cannot read.
    """
    problems = []
    for name in ("gpus", "time", "partition", "account", "image"):
        value = getattr(wishes, name)
        if value is None:
            continue
        if name not in TAKES[target]:
            takers = " or ".join(f"`--to {other}`" for other, names in TAKES.items() if name in names)
            problems.append(f"--{name}: `--to {target}` has no use for it; it is for {takers}")
        elif _WORD.match(value) is None:
            problems.append(f"--{name} {value}: it may hold letters, digits and `_.,:@+/=-` only")
    gpus = wishes.gpus
    if gpus is not None and "gpus" in TAKES[target]:
        if _GPUS.match(gpus) is None:
            problems.append(f"--gpus {gpus}: write their number on each machine, such as `8` or `H100:8`, or `0`")
        elif target == "sky" and ":" not in gpus and gpus != "0":
            problems.append(f"--gpus {gpus}: SkyPilot wants the kind of GPU as well, such as `H100:{gpus}`")
    if wishes.extra and target != "slurm":
        problems.append(f"{wishes.extra[0]}: options after `--` are for sbatch, with `--to slurm`")
    elif wrong := next((word for word in wishes.extra if not word.startswith("-") or "\n" in word), None):
        problems.append(f"{wrong}: not an option of sbatch; after `--` write options such as `--constraint=h100`")
    if problems:
        raise ConfigError(problems)


def gpus_of(target: Target, wishes: Wishes) -> int | None:
    """The GPUs of each machine of the job; None for machines that the job does not choose."""
    if "gpus" not in TAKES[target]:
        return None
    if wishes.gpus is None:
        return sys.maxsize if target == "slurm" else 0  # Slurm is asked for one for each process
    return int(wishes.gpus.rpartition(":")[2])


def write_job(
    planned: Plan, assignments: Sequence[str], target: Target, wishes: Wishes, until: str | None = None
) -> Job:
    """Write the resolved config and the job file beside the config.

    `assignments` are those that the plan was made with.

    Raises:
        ConfigError: a file of the user is in the way, no stage would use the machines, or the config is not in the
            folder that SkyPilot copies to the machines.
    """
    config = planned.pipeline.path
    saves = planned.saves
    if target == "sky":  # it copies the current folder to the machines, where that has another name
        found, saves = _in_current(config), _in_current(saves) or saves
        if found is None:
            text = f"{config}: SkyPilot copies only the current folder `{Path.cwd()}` to the machines"
            raise ConfigError([f"{text}; call `launch` in a folder that has the config in it"])
        config = found
    stem = config.stem.removesuffix(".resolved")
    resolved, suffix = config.with_name(f"{stem}.resolved.yaml"), TEMPLATES[target].removesuffix(".jinja")
    file = config.with_name(f"{stem}.{suffix}")
    _check_own([path for path in (resolved, file) if path.resolve() != config.resolve()])
    launches = [step.entry.launch for step in planned.steps]
    widest = max(launches, key=lambda launch: (launch.machines, launch.processes), default=Launch())
    if wishes.nodes not in (None, widest.machines):
        text = f"--nodes {wishes.nodes}: no stage would use them"
        raise ConfigError(
            [f"{text}; only stages that train do, and those with a `launch` of their own follow that one"]
        )
    logs = saves / folder_name(resolved) / LOGS
    command = [*_program(), "run", str(resolved), "--saves", str(saves)]
    command += ["--until", until] if until is not None else []
    lines = _lines(target, file, widest)
    text = _rendered(target, wishes, planned, config, file, widest, logs, command, lines)
    resolved.write_text(resolved_config(config, assignments, by_cluster=target in SUBMIT), encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    logs.mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    return Job(target, resolved, file, logs, text, lines, list(_notes(target, wishes, widest)))


def _in_current(path: Path) -> Path | None:
    """The same path relative to the current folder; None if it is in another one."""
    full, here = path.parent.resolve() / path.name, Path.cwd().resolve()
    return full.relative_to(here) if full.is_relative_to(here) else None


def _check_own(files: Sequence[Path]) -> None:
    """
    Raises:
        ConfigError: a file is there that `pipeline launch` has not written.
    """
    there = (path for path in files if path.exists())
    other = [path for path in there if MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]]
    if other:
        raise ConfigError([f"{path}: is in the way of the file that `launch` writes; move it" for path in other])


def resolved_config(config: Path, assignments: Sequence[str], *, by_cluster: bool) -> str:
    """The text of a config that stands for another one together with its `--set` options.

    Which machine it is, and with `by_cluster` where the machines meet, is left to the environment.
    """
    document = read(config)
    document.drop_extensions()
    for assignment in assignments:
        document.set(assignment)
    root = document.data
    stages = root.get("stages")
    for owner in (root, *(stages.values() if isinstance(stages, dict) else ())):
        launch = owner.get("launch") if isinstance(owner, dict) else None
        for name in ("rank", "rendezvous") if by_cluster else ("rank",):
            if isinstance(launch, dict):
                launch.pop(name, None)
    with_set = "".join(f" --set {assignment}" for assignment in assignments)
    head = f"{MARK}` from {config}{with_set}; comments are not copied. Change that file, and write this one again."
    text = "\n".join([*(f"# {line}".replace("# # ", "# ") for line in head.splitlines()), *_block(root, "")]) + "\n"
    if repr(parse(text, str(config)).data) != repr(root):
        raise RuntimeError(f"{config}: its resolved text reads as other values")
    return text


def _block(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    """The lines of a mapping; what is not a mapping is written on one line."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield f"{indent}{scalar(key)}:"
            yield from _block(inner, indent + "  ")
        else:
            yield f"{indent}{scalar(key)}: {_flow(inner)}"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if not isinstance(value, float):
        return scalar(value)
    return repr(value) if math.isfinite(value) else re.sub("(inf|nan)", r".\1", repr(value))  # `1.0` stays a float


def _program() -> list[str]:
    """The command `pipeline` of this environment."""
    script = Path(sys.executable).with_name("pipeline")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "pipeline.cli"]


def _rendered(
    target: Target,
    wishes: Wishes,
    planned: Plan,
    config: Path,
    file: Path,
    launch: Launch,
    logs: Path,
    command: Sequence[str],
    lines: Sequence[str],
) -> str:
    """The text of the job file."""
    gpus = wishes.gpus if wishes.gpus is not None else str(launch.processes) if target == "slurm" else "0"
    checkout = (Path.cwd() / "install.sh").is_file() and (Path.cwd() / "stages").is_dir()
    if target == "sky":  # the program is installed there
        command = [".venv/bin/pipeline" if checkout else "pipeline", *command[len(_program()) :]]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # no markup: a shell script and YAML
    ).get_template(TEMPLATES[target])
    return template.render(
        config=config,
        job=shlex.quote(str(file)),
        name=re.sub(r"[^A-Za-z0-9-]+", "-", config.stem.removesuffix(".resolved")).strip("-").lower() or "pipeline",
        machines=launch.machines,
        gpus=gpus if gpus.rpartition(":")[2].lstrip("0") else "",
        time=wishes.time,
        partition=wishes.partition,
        account=wishes.account,
        image=wishes.image,
        extra=wishes.extra,
        logs=shlex.quote(str(logs)),
        directory=json.dumps(str(Path.cwd()), ensure_ascii=False) if target == "sky" else shlex.quote(str(Path.cwd())),
        setup="./install.sh" if checkout else f"pip install stagewise=={version('stagewise')}",
        command=shlex.join(command),
        lines=lines,
    )


def _lines(target: Target, file: Path, launch: Launch) -> list[str]:
    """What to type to start the job."""
    if target in SUBMIT:
        return [shlex.join([*SUBMIT[target], str(file)])]
    if launch.machines == 1:
        return [shlex.join(["bash", str(file)])]
    meet = "" if launch.rendezvous != "env" else "MASTER_ADDR=HOST MASTER_PORT=29500 "
    typed = (f"NODE_RANK={rank} {meet}bash {shlex.quote(str(file))}" for rank in range(launch.machines))
    return [f"{line}{'   # HOST: the address of machine 0' if meet and not rank else ''}"
            for rank, line in enumerate(typed)]  # fmt: skip


def _notes(target: Target, wishes: Wishes, launch: Launch) -> Iterator[str]:
    """What the user should know of a job that can be started all the same."""
    count = int((wishes.gpus or "0").rpartition(":")[2])
    if count > launch.processes:
        used = f"{count} GPUs of each machine are asked for, and {launch.processes} of them train"
        yield f"{used}; `--set launch.processes={count}` uses all"
    if target == "sky" and wishes.gpus is None and launch.processes > 1:
        asked = f"no GPU is asked for, and {launch.processes} processes train on each machine"
        yield f"{asked}; `--gpus H100:{launch.processes}` asks for GPUs"
    if target == "sky" and launch.machines > 1:
        disk = "`saves` must be on a disk that all machines share"
        yield f"{disk}; add `volumes:` to the job file, and give a folder there to `--saves`"


def submit(job: Job) -> str:
    """Give a job to the cluster; returns what the cluster answered.

    Raises:
        ConfigError: the program of the cluster is not here.
        StageError: the cluster refused the job.
    """
    words = [*SUBMIT[job.target], str(job.file)]
    if shutil.which(words[0]) is None:
        wrote = f"wrote {job.resolved} and {job.file}"
        raise ConfigError([f"--to {job.target}: there is no `{words[0]}` here; {wrote}; submit with `{job.lines[0]}`"])
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise StageError(f"`{shlex.join(words)}` was refused: {said}")
    return done.stdout.strip()
