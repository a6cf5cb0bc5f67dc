"""What the settings of a stage stand for, by their types: models (`ModelRef`, …), data sets (`Source`, `Mixture`).

The pipeline resolves references by these types, so that it knows no stage by its name.
"""

import types
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from stages.data.mixture import Mixture
from stages.data.source import Source


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


class Role(Enum):
    """What the value of a setting stands for."""

    START = "the model that the stage starts from"
    SCORER = "a reward model"
    OTHER = "another model"
    COMPARED = "models above, by their names"
    SOURCES = "data sets"
    MIXTURE = "data sets, with weights or without"
    NAMED = "data sets by their names"
    PROMPTS = "data sets by their names, or a list of texts"


_REFERENCES = {
    Reference.START: Role.START,
    Reference.SCORER: Role.SCORER,
    Reference.OTHER: Role.OTHER,
    Reference.COMPARED: Role.COMPARED,
}


def roles(config: type[BaseModel]) -> dict[tuple[str, ...], Role]:
    """The settings of a config that stand for models or data: the path of each, such as ("calibration", "data")."""
    found: dict[tuple[str, ...], Role] = {}
    for name, info in config.model_fields.items():
        parts = [*info.metadata, *_parts(info.annotation)]
        role = _role(parts)
        if role is not None:
            found[(name,)] = role
            continue
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {(name, *path): inner for path, inner in roles(part).items()}
    return found


def _role(parts: Sequence[Any]) -> Role | None:
    for part in parts:
        if isinstance(part, Reference):
            return _REFERENCES[part]
    if Mixture in parts:
        return Role.MIXTURE
    if Source not in parts:
        return None
    if not any(get_origin(part) is dict for part in parts):
        return Role.SOURCES
    return Role.PROMPTS if list[str] in parts else Role.NAMED


def _parts(annotation: Any) -> Iterator[Any]:
    """The annotation and everything in it: members of unions, items of lists, metadata of Annotated."""
    yield annotation
    if isinstance(annotation, types.GenericAlias | types.UnionType) or get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _parts(part)
