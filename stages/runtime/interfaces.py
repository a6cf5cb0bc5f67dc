"""Private interfaces of libraries that this project relies on, checked when a stage starts."""

import inspect
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from stages.runtime.errors import StageError

# The versions that the tests ran with; constraints.txt pins them.
KNOWN_TO_WORK = {
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "gptqmodel": "7.6.0",
    "tokenizers": "0.23.3",
}


def require(library: str, owner: Any, *names: str) -> None:
    """Check that a class, an object or a module of a library still has these attributes.

    Raises:
        StageError: an attribute is missing; names the installed version and the version that is known to work.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        whose = getattr(owner, "__name__", type(owner).__name__)
        refuse(library, f"has no `{whose}.{missing[0]}`, which this stage needs")


def require_parameters(library: str, function: Any, *first: str, named: tuple[str, ...] = ()) -> None:
    """Check that the parameters of a function still begin with `first`, and that `named` are among them.

    Raises:
        StageError: as `require`.
    """
    parameters = tuple(inspect.signature(function).parameters)
    if parameters[: len(first)] != first or not {*named} <= {*parameters}:
        call = ", ".join([*first, *(f"{name}=…" for name in named)])
        refuse(library, f"has no `{function.__qualname__}({call})`, which this stage needs")


def refuse(library: str, trouble: str) -> NoReturn:
    """Stop because of a library. `trouble` continues a sentence that starts with its name and version.

    Raises:
        StageError: always; names the installed version of the library and the version that is known to work.
    """
    known = KNOWN_TO_WORK[library]
    advice = f"{library} {known} is known to work: `pip install {library}=={known}`"
    raise StageError(f"{library} {version(library)} {trouble}; {advice}")


@cache
def source(library: str, *path: str) -> str:
    """The text of a file of an installed library, such as ("torch", "version.py"); empty where it is not there.

    The library is not imported.
    """
    spec = find_spec(library)
    folders = spec.submodule_search_locations if spec is not None else None
    file = Path(next(iter(folders or [""])), *path)
    return file.read_text(encoding="utf-8") if folders and file.is_file() else ""
