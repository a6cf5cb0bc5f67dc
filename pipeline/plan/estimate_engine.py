"""Questions about the memory and the speed of stages, answered by one process that loads torch, and remembered."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.plan.fingerprint import digest
from pipeline.saves.content import ESTIMATES
from stages.runtime.files import sha256
from stages.runtime.hashes import write_cache

ROOT = Path(__file__).parents[2]
CHILD = "pipeline.plan.estimate_child"
CODE = ("pipeline/plan/estimate_child.py", "stages/*.py", "stages/training/*.py", "stages/model/*.py")
"""The files that an answer depends on besides the question."""
PURPOSE = "estimating memory and time; this takes a few seconds, and is remembered (`--no-estimate` skips it)"


class Engine:
    """Answers questions from the cache in `saves`, or by its process, which starts with the first question.

    Without `compute` no process is started.
    """

    def __init__(self, saves: Path, *, compute: bool, say: Callable[[str], None]) -> None:
        self.folder, self.compute, self.say = saves / ESTIMATES, compute, say
        self.purpose: str | None = PURPOSE
        """What the next questions are for; it is said when the process has to answer one."""
        self.process: subprocess.Popen[str] | None = None
        files = sorted(file for pattern in CODE for file in ROOT.glob(pattern))
        self.code = [sha256(file) for file in files]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.communicate()  # closes its input, and so it ends

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; `{"why": …}` if there is none, and None if it is not remembered and nothing is computed."""
        file = self.folder / f"{digest({**question, 'code': self.code})[:32]}.json"
        with suppress(OSError, ValueError):
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if not self.compute:
            return None
        found = self._asked(question)
        if found is None:
            return {"why": "the process that estimates has ended without an answer"}
        if found.pop("passing", False):
            return found
        write_cache(file, json.dumps(found, ensure_ascii=False).encode())
        return found

    def _asked(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.purpose is not None:
            self.say(self.purpose)
            self.purpose = None
        process = self.process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question, ensure_ascii=False) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self.__exit__()
        self.process = None
        return None

    def _started(self) -> "subprocess.Popen[str]":
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        return self.process
