"""All stages of a run under one name in whatever `report_to` names, unless the user says otherwise.

transformers' integrations take a run's name and trackio's project from the trainer's settings, the rest from the
environment. TensorBoard's files differ from run to run, so they lie beside the artifacts and never in one.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENDS: dict[str, Callable[[Any, int], object]] = {  # of a tracker's module and the stage's exit code
    "wandb": lambda wandb, code: wandb.finish(exit_code=code),
    "mlflow": lambda mlflow, code: mlflow.end_run(status="FAILED" if code else "FINISHED"),
    "swanlab": lambda swanlab, _: swanlab.finish(),
    "trackio": lambda trackio, _: trackio.finish(),
}
PATIENCE = 60  # seconds
TENSORBOARD = "tensorboard"  # the folder beside a config's links


def environment(spec: Mapping[str, Any], out: Path) -> dict[str, str]:
    """What the trackers read; `out` is the stage's unfinished folder in `saves`."""
    name = spec["of"]
    # A folder for each recipe: with other settings a stage is another curve.
    curve = out.parent / name / TENSORBOARD / f"{spec['stage']}-{spec['fingerprint'][:12]}"
    return {
        "TENSORBOARD_LOGGING_DIR": str(curve.resolve()),
        "WANDB_PROJECT": name,
        "WANDB_RUN_GROUP": name,
        "MLFLOW_EXPERIMENT_NAME": name,
        "SWANLAB_PROJECT": name,
        "TRACKIO_PROJECT": name,
    }


def group(spec: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Set the environment for this process; the stage's settings with a name for its run."""
    for variable, value in environment(spec, out).items():
        os.environ.setdefault(variable, value)
    config: dict[str, Any] = spec["config"]
    if "trainer" not in config:
        return config
    project = os.environ["TRACKIO_PROJECT"]  # trackio itself does not look at it when it is told a project
    names = {"run_name": f"{spec['of']}/{spec['stage']}", "project": project}
    return {**config, "trainer": {**names, **config["trainer"]}}


def finish(spec: Mapping[str, Any], code: int) -> None:
    """End the trackers' runs, so that nothing they hold is lost; with a `code` that is not 0, as failed.

    They wait for Python's exit handlers, which a process forked by `multiprocessing` leaves without calling. What goes
    wrong is in the log, and one that takes too long is left behind: neither costs the stage.
    """
    named = spec["config"].get("trainer", {}).get("report_to") or []
    for name, end in ENDS.items():
        if name in sys.modules and (name in named or "all" in named):  # a name, or a list of them
            waiting = threading.Thread(target=_end, args=(end, sys.modules[name], code), daemon=True)
            waiting.start()
            waiting.join(PATIENCE)


def _end(end: Callable[[Any, int], object], tracker: Any, code: int) -> None:
    try:
        end(tracker, code)
    except BaseException:
        traceback.print_exc()
