"""Private interfaces of libraries that this project relies on, checked when a stage starts."""

from importlib.metadata import version
from typing import Any

from stages.runtime.errors import StageError

# The versions that the tests ran with; constraints.txt pins them.
KNOWN_TO_WORK = {
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "gptqmodel": "7.6.0",
}


def require(library: str, owner: Any, *names: str) -> None:
    """Check that a class, an object or a module of a library still has these attributes.

    Raises:
        StageError: an attribute is missing; names the installed version and the version that is known to work.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        whose = getattr(owner, "__name__", type(owner).__name__)
        raise StageError(
            f"{library} {version(library)} has no `{whose}.{missing[0]}`, which this stage needs; "
            f"{library} {KNOWN_TO_WORK[library]} is known to work: `pip install {library}=={KNOWN_TO_WORK[library]}`"
        )
