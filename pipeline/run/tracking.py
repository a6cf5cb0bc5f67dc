"""Groups all stages of a run under one name in the trackers of `report_to`, unless the user sets names.

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

from pipeline.config.pipeline import TENSORBOARD

ENDS: dict[str, Callable[[Any, int], object]] = {  # of a tracker's module and the stage's exit code
    "wandb": lambda wandb, code: wandb.finish(exit_code=code),
    "mlflow": lambda mlflow, code: mlflow.end_run(status="FAILED" if code else "FINISHED"),
    "swanlab": lambda swanlab, _: swanlab.finish(),
    "trackio": lambda trackio, _: trackio.finish(),
}
PATIENCE = 60  # seconds


def environment(spec: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Environment variables that the trackers read; `out` is the working folder of the stage in `saves`."""
    name = spec["of"]
    # One folder for each recipe: a stage with other settings is another curve.
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
    """Set the environment of this process; returns the settings of the stage with a name for its run."""
    for variable, value in environment(spec, out).items():
        os.environ.setdefault(variable, value)
    config: dict[str, Any] = spec["config"]
    if "trainer" not in config:
        return config
    project = os.environ["TRACKIO_PROJECT"]  # trackio itself does not look at it when it is told a project
    names = {"run_name": f"{spec['of']}/{spec['stage']}", "project": project}
    return {**config, "trainer": {**names, **config["trainer"]}}


def finish(spec: Mapping[str, Any], code: int) -> None:
    """End the runs of the trackers, so that they write what they hold; a `code` other than 0 marks them as failed.

    Trackers rely on Python's exit handlers, which a process forked by `multiprocessing` does not call. Errors go to the
    log, and a tracker that takes too long is abandoned: neither fails the stage.
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
