"""Types of settings that name a model. `config` and `plan` know what a setting stands for by its type."""

from enum import Enum
from typing import Annotated


class Reference(Enum):
    """What a setting names."""

    START = "start"
    SCORER = "scorer"
    OTHER = "other"
    COMPARED = "compared"


ModelRef = Annotated[str, Reference.START]
"""The model that a stage starts from: a folder, `org/name@commit` on the Hub, or `$stage`. Default: the stage above."""

ScorerRef = Annotated[str, Reference.SCORER]
"""A reward model: a folder, `org/name@commit` on the Hub, or `$stage` of a stage that leaves one."""

OtherModel = Annotated[str, Reference.OTHER]
"""Any other model: a folder, or `org/name@commit` on the Hub."""

Compared = Annotated[list[str], Reference.COMPARED]
"""Names of stages above that leave a model, or `base`, the model at the top of the file."""
