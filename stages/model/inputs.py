"""The models and data sets that a stage's settings name, resolved to folders and files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stages.data.source import Source


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The resolved inputs of a stage; each path exists when the stage runs."""

    model: Sequence[str] = ()
    """Folders of the model that the stage starts from: the base first, then the adapters on it, in order."""
    compared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name → folders, as `model`, of each model that the stage compares."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Setting → folder of every other model."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """`$stage` → the file of rows that this stage left."""

    def read(self, source: Source) -> Source:
        """The source; if its path is `$stage`, with the file of rows in its place."""
        file = self.rows.get(source.path)
        return source if file is None else source.model_copy(update={"path": file})
