"""The process that estimates: a line of JSON with a question in, a line of JSON with its answer out. It loads torch.

A question names a stage (`estimate`), or asks how fast this machine multiplies matrices (`measure`).
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import find
from stages.model.device import hide_all_gpus_but_one
from stages.runtime.errors import StageError, explain
from stages.runtime.processes import end_with_parent
from stages.training.estimate import Batch, estimate
from stages.training.settings import TrainingConfig
from stages.training.sharing import Sharing

PLACEHOLDER = {"model": "model", "data": {"sources": [{"path": "rows", "format": "text"}]}}
"""What the settings of a stage need, and its memory does not depend on."""
SECONDS = 0.3
"""How long matrices are multiplied to measure the speed."""


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a question; `{"why": …}` where there is none, with `passing` where there may be one later."""
    try:
        return _measured(**question["measure"]) if "measure" in question else _estimated(question["estimate"])
    except StageError as error:
        return {"why": str(error)}
    except Exception as error:
        lines = (explain(error) or str(error)).splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return {"why": why, "passing": "measure" in question or isinstance(error, OSError | MemoryError)}


def _estimated(asked: Mapping[str, Any]) -> dict[str, Any]:
    stage = find(asked["use"])
    config = stage.config.model_validate({**asked["config"], **PLACEHOLDER})
    assert isinstance(config, TrainingConfig)
    kind = stage.settings["trainer"].rpartition(":")[2]
    batch = Batch(**{**asked["batch"], "documents": tuple(asked["batch"]["documents"])})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(asked["model"]), encoding="utf-8")
        found = estimate(kind, config, Path(folder), batch, Sharing(**asked["sharing"]), gpu=asked["gpu"])
    return asdict(found)


def _measured(tokens: int, hidden: int, wide: int, gpu: bool) -> dict[str, Any]:
    """The most floating-point operations a second of products of (tokens × hidden) and (hidden × wide) matrices.

    In bfloat16 on a GPU, in float32 elsewhere. The fastest product counts: other programs slow some of them down.
    """
    import torch

    where = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {"device": "cpu", "dtype": torch.float32}
    a, b = torch.ones(tokens, hidden, **where), torch.ones(hidden, wide, **where)
    began, best = time.monotonic(), math.inf
    while best == math.inf or time.monotonic() - began < SECONDS:
        start = time.monotonic()
        (a @ b)[0, 0].item()  # waits for the GPU
        best = min(best, time.monotonic() - start)
    return {"rate": 2.0 * tokens * hidden * wide / best}


def main() -> None:
    """Answer each line of the standard input. What libraries print goes to the standard error."""
    end_with_parent()
    hide_all_gpus_but_one()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line)), ensure_ascii=False) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
