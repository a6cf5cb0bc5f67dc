"""Packages that transformers and PEFT import when they find them, kept from being found in a run that needs none.

Importing torchao, bitsandbytes and scipy takes a quarter of the time of all imports, and GPTQModel 1.4 s in each stage
that trains. None in `sys.modules` is Python's way of saying that a module is not there.
"""

import os
import sys
from collections.abc import Iterable

OPTIONAL = ("bitsandbytes", "torchao", "scipy")
"""What is set aside before the libraries are imported, unless a stage of the run needs it."""
QUANTIZED = ("gptqmodel", "torchao")
"""What is set aside in a stage that reads no quantized model: PEFT looks for its layers in every model."""
VARIABLE = "PIPELINE_SET_ASIDE"
"""The environment variable that tells the server of a run what to set aside."""


def choose(needed: Iterable[str]) -> None:
    """Tell the processes of this run what to set aside: what no stage needs."""
    kept = set(needed)
    os.environ[VARIABLE] = " ".join(name for name in OPTIONAL if name not in kept)


def set_aside(names: Iterable[str] | None = None) -> None:
    """Let modules that are not imported yet not be found; those of the run by default."""
    for name in os.environ.get(VARIABLE, "").split() if names is None else names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def bring_back(*names: str) -> None:
    """Let modules be found again."""
    for name in names:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
