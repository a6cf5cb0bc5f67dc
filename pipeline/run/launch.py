"""Several processes for one training stage, started by accelerate's launcher, which is torchrun with more settings.

`Launched` is the runner's side: it writes accelerate's settings into the stage's folder and starts the launcher.
`python -m pipeline.run.launch FOLDER ARGUMENTS` is that launcher: accelerate's own command, and an event that says
which process ended first. Each process of the group runs `pipeline.run.worker`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.pipeline import Launch
from pipeline.errors import StageFailed
from pipeline.run.process import ENVIRONMENT
from pipeline.saves import artifact
from pipeline.saves.artifact import SPEC
from stages.model.device import has_gpu
from stages.runtime.events import ENDED, LAUNCHED, LAUNCHER, emit
from stages.runtime.processes import end_with_parent, usable_cores

ACCELERATE, DEEPSPEED = "launch.json", "deepspeed.json"
"""Generated settings, kept in the artifact: accelerate's, and DeepSpeed's where it shares the training."""


@dataclass(frozen=True)
class Place:
    """Where the processes of this machine stand among those of all machines."""

    rank: int = 0
    """Of this machine."""
    host: str | None = None
    """Of machine 0; None for one machine alone."""
    port: int = 0
    """Where the machines meet; 0 for one machine alone, which takes a free one."""


class Launched:
    """A stage in several processes of this machine, which may be one of several machines."""

    def __init__(self, launch: Launch, part: Path, place: Place | None = None) -> None:
        """
        Raises:
            StageFailed: the port where the machines are to meet is taken.
        """
        place = place or Place()
        if launch.machines > 1 and place.rank == 0:
            _check_port(place.port)
        for name, settings in configs(launch, gpu=has_gpu()).items():
            (part / name).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pipeline.run.launch", str(part), *_arguments(launch, part, place)]
        command += ["-m", "pipeline.run.worker", str(part / SPEC)]
        threads = max(1, usable_cores() // launch.processes)
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **os.environ}
        for name in list(environment):  # of a launcher around this program; torchrun takes options from PET_*
            if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or name.startswith("PET_"):
                del environment[name]
        environment[LAUNCHED] = json.dumps(asdict(launch.sharing))
        if not has_gpu():
            # With accelerate's setting for a CPU, DeepSpeed would not be used.
            zero = launch.strategy in ("zero2", "zero3")
            environment |= {"DS_ACCELERATOR": "cpu"} if zero else {"ACCELERATE_USE_CPU": "true"}
        with open(part / artifact.LOG, "ab") as log:
            # A session of its own, so that Ctrl-C reaches only the runner, which then asks the first process to stop.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.pid: int | None = None  # the launcher is never signalled: it would kill its processes at once

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def exit_code(self) -> int | None:
        return self.process.returncode

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)


def configs(launch: Launch, *, gpu: bool) -> dict[str, dict[str, Any]]:
    """Name → content of the settings files of a launch. They say nothing of hosts, and are the same on each machine."""
    accelerate: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # in accelerate: several processes, on a CPU as well
        "num_processes": launch.world,
        "num_machines": launch.machines,
        "use_cpu": not gpu,
    }
    if launch.strategy == "fsdp2":
        accelerate["distributed_type"] = "FSDP"
        accelerate["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": launch.offload is not None,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,  # adapters are folded into the whole model first
        }
    if launch.strategy not in ("zero2", "zero3"):
        return {ACCELERATE: accelerate}
    accelerate["distributed_type"] = "DEEPSPEED"
    accelerate["deepspeed_config"] = {
        "deepspeed_config_file": DEEPSPEED,
        "deepspeed_multinode_launcher": "standard",  # torchrun's
        "zero3_init_flag": False,  # adapters are folded into the whole model first
    }
    return {ACCELERATE: accelerate, DEEPSPEED: _deepspeed(launch)}


def _deepspeed(launch: Launch) -> dict[str, Any]:
    """DeepSpeed's settings; transformers puts its own in place of `auto`."""
    zero: dict[str, Any] = {"stage": int(launch.strategy[-1]), "reduce_bucket_size": "auto"}
    if launch.offload is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if launch.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if launch.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(names, "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW; DeepSpeed's needs a C++ compiler
    }


def _arguments(launch: Launch, part: Path, place: Place) -> list[str]:
    """What this machine says to accelerate's launcher besides the settings file."""
    words = {
        "--config_file": part / ACCELERATE,
        "--mixed_precision": "no",  # the stage says it
        "--dynamo_backend": "no",
        "--machine_rank": place.rank,
        "--main_process_port": place.port,
    }
    if launch.strategy in ("zero2", "zero3"):
        words["--deepspeed_config_file"] = part / DEEPSPEED
    if launch.machines > 1:
        conf = f"timeout={launch.seconds},join_timeout={launch.seconds}"
        words |= {"--main_process_ip": place.host, "--rdzv_conf": conf}
    return [str(word) for pair in words.items() for word in pair]


def _check_port(port: int) -> None:
    """
    Raises:
        StageFailed: another program listens on the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            text = f"`launch.rendezvous`: port {port} cannot be used here ({error.strerror})"
            raise StageFailed(f"{text}; end the program that uses it, or choose another port") from None


# The launcher


def main(folder: str, arguments: list[str]) -> None:
    """Run accelerate's launcher; of the processes that failed, an event names the one that ended first."""
    # A SIGTERM to every process, as Slurm and systemd send it, is for the stage: it saves a checkpoint and ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    sys.argv = ["accelerate launch", *arguments]
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        launch.main()
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = first_ended(codes, error.get_first_failure()[0])
        emit(Path(folder), ENDED, rank=rank, code=codes[rank])
        raise


def first_ended(codes: Mapping[int, int], first: int) -> int:
    """The process that made the others fail: one that a signal ended, or else the `first` that was seen to fail.

    `codes`: process → exit code, minus the signal. SIGTERM is what torchrun sends the others.
    """
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    return killed[0] if killed and first not in killed else first


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
