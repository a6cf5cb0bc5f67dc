"""Whether a type of model can read a row that is longer than its positions, as the source of transformers shows."""

import importlib.util
import re
from functools import cache
from pathlib import Path

_COMPUTED = re.compile(r"^class \w*(Rotary|Sinusoidal)\w*\(", re.M)


def sources(model_type: str) -> list[Path]:
    """The folder of a type of model in the installed transformers, which is not imported; empty if it has none."""
    spec = importlib.util.find_spec("transformers")
    roots = spec.submodule_search_locations or [] if spec is not None else []
    folders = [Path(root, "models", model_type.replace("-", "_")) for root in roots]
    return [folder for folder in folders if model_type and folder.is_dir()]


@cache
def are_computed(model_type: str) -> bool:
    """Whether positions are computed as they are needed: rotary and sinusoidal ones, also if the source is not found.

    Learned positions (GPT-2, OPT) and tables of a fixed length (GPT-J, MPT) end: the model fails on a longer row.
    """
    files = [file for folder in sources(model_type) for file in folder.glob("modeling_*.py")]
    return not files or any(_COMPUTED.search(file.read_text(encoding="utf-8")) for file in files)
