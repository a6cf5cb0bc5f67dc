"""Runs one stage in a process of its own: its spec in, its folder and events out.

Forked from a warm server (see `runner`), or started by accelerate's launcher as `python -m pipeline.run.worker SPEC`
in each of several processes. What the libraries print goes to the folder's `log.txt`.
"""

import contextlib
import fcntl
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Literal, TextIO

from pipeline import secret
from pipeline.run import tracking
from pipeline.saves import artifact
from pipeline.saves.locks import held_file
from stages import find
from stages.model.device import hide_all_gpus_but_one
from stages.model.inputs import Inputs
from stages.runtime import aside
from stages.runtime.errors import MORE_MEMORY, Interrupted, explain
from stages.runtime.events import LAUNCHED, LAUNCHER, REPORTS, emit
from stages.runtime.processes import end_with_parent, peak_memory
from stages.training.sharing import leave_group

Hook = Literal["run", "rehearse"]


def main(spec_file: str, hook: Hook = "run") -> None:
    """Run or rehearse the stage of a spec file and exit with 0, 1 or 75; never returns.

    It works in the folder of the spec file, or in `out` of the spec; then the spec's folder has its log and events.
    """
    gc.freeze()  # the libraries of the server are never garbage; a collection over all of them takes 0.3 s
    reports = Path(spec_file).parent
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    out = Path(spec.get("out", reports))
    if out != reports:
        os.environ[REPORTS] = str(reports)
    to_log(reports / artifact.LOG)
    end_with_parent(int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else None)
    held = _hold(out)
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach every process of a terminal; the runner decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if LAUNCHED not in os.environ:
        _alone(spec["use"])
    _choose_packages(spec["use"])
    for name in secret.HUB:  # a stage is offline and needs no token
        os.environ.pop(name, None)
    emit(out, "start", pid=os.getpid())
    code = _run(spec, out, hook)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the trackers are still busy; a second Ctrl-C kills the process
    tracking.finish(spec, code)
    held.close()
    sys.exit(code)


def _alone(use: str) -> None:
    """Forget what a launcher or a cluster around this program has set.

    A stage that can use several GPUs by `launch: {processes: N}` sees one of them; any other stage sees all.
    """
    leave_group()
    if find(use).parallel is not None:
        hide_all_gpus_but_one()


def _choose_packages(use: str) -> None:
    """Let a stage that reads quantized models find all packages, and any other one only those that its run needs."""
    if "gptqmodel" in find(use).libraries:
        aside.bring_back(*aside.OPTIONAL)
        return
    unused = os.environ.get(aside.VARIABLE, "").split()
    aside.bring_back(*(name for name in aside.OPTIONAL if name not in unused))  # the server may be that of another run
    aside.set_aside()
    if "torchao" in unused:
        aside.set_aside(aside.QUANTIZED)


def _hold(out: Path) -> TextIO:
    """Take the lock that the processes of a stage share; a later runner sees from it that they still work."""
    file = open(held_file(out), "a+", encoding="utf-8")  # noqa: SIM115 - held until the process ends
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _run(spec: dict[str, Any], out: Path, hook: Hook) -> int:
    memory = MORE_MEMORY
    try:
        stage = find(spec["use"])
        config = stage.config.model_validate(tracking.group(spec, out))
        memory = stage.more_memory(config) if stage.more_memory is not None else memory
        inputs = Inputs(**spec["inputs"])
        if hook == "run":
            metrics = stage.run(config, inputs, out)
        else:
            assert stage.rehearse is not None
            stage.rehearse(config, inputs, out)
            metrics = {}
        emit(out, "done", metrics=metrics, memory=peak_memory())
        return 0
    except Interrupted as error:
        emit(out, "interrupted", text=str(error), memory=peak_memory())
        return Interrupted.exit_code
    except Exception as error:
        traceback.print_exc()
        text = explain(error, memory)
        with contextlib.suppress(OSError):  # the disk may be full; then the log's last lines must do
            emit(out, "error", text=text, traceback=None if text else traceback.format_exc())
        return 1


def to_log(path: Path) -> None:
    """Send everything this process prints, C libraries included, to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    main(sys.argv[1])
