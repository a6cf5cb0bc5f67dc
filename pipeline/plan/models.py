"""Models in a plan: a reference in, its folders, what identifies its content, and what is known of it out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.plan.fingerprint import digest
from pipeline.saves import artifact
from pipeline.saves.content import Hashes
from stages.model.facts import Facts, is_hub_name, locate_model, read_facts
from stages.runtime.errors import StageError

KINDS = (".safetensors", ".json", ".jinja", ".model")  # files of a model folder that later stages read


@dataclass(frozen=True)
class PlacedModel:
    """A model at some place in the chain."""

    folders: list[str]
    """The base first, then the adapters on it."""
    identity: str
    """A fingerprint, a hash of files, or a pinned name on the Hub: the same for the same content."""
    facts: Facts
    files: Mapping[str, str] = field(default_factory=dict)
    """Path → sha256 of its files in a folder that no stage made."""


class Models:
    """The models of a plan; stages add what they leave."""

    def __init__(self, hashes: Hashes, notes: list[str], *, fetch: bool) -> None:
        self.hashes, self.notes, self.fetch = hashes, notes, fetch
        self.made: dict[str, PlacedModel] = {}
        """By the name of the stage."""
        self._bases: dict[str, PlacedModel | None] = {}

    def find(self, reference: str, report: Callable[[str], None]) -> PlacedModel | None:
        """The model of a reference; None when it could not be resolved, and the problem is reported, once."""
        if reference.startswith("$"):
            return self.made.get(reference[1:])
        if reference not in self._bases:
            self._bases[reference] = self._base(reference, report)
        return self._bases[reference]

    def _base(self, model: str, report: Callable[[str], None]) -> PlacedModel | None:
        """A model that no stage makes: a folder by the hashes of its files, a Hub model by its pinned revision."""
        try:
            folder = locate_model(model, download=self.fetch)
            if folder is None:
                self.notes.append(f"`{model}` is not on this machine; `run` fetches it, until then it is unchecked")
                return PlacedModel([model], f"hub:{model}", Facts(f"`{model}`", {}, known=False))
            facts = read_facts(folder, f"`{model}`")
        except StageError as error:
            report(str(error))
            return None
        if is_hub_name(model):
            return PlacedModel([str(folder)], f"hub:{model}", facts)
        files = sorted(
            path for path in folder.iterdir() if path.suffix in KINDS and path.name not in artifact.NOT_CONTENT
        )
        content = dict(zip(map(str, files), self.hashes.of(files), strict=True))
        identity = "folder:" + digest({Path(path).name: known for path, known in content.items()})
        return PlacedModel([str(folder)], identity, facts, content)
