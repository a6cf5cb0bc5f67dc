"""Models in a plan: a reference in, its folders, what identifies its content, and what is known of it out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.plan.fingerprint import digest
from pipeline.saves import artifact
from stages.model.adapters import base_of, is_adapter, with_adapter
from stages.model.facts import Facts, Header, chain_of, is_hub_name, locate_model, read_facts
from stages.model.hub import look_up
from stages.runtime.errors import StageError
from stages.runtime.figures import size_of
from stages.runtime.hashes import Hashes

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

    def __init__(self, hashes: Hashes, notes: list[str], *, fetch: bool, online: bool = False) -> None:
        self.hashes, self.notes, self.fetch, self.online = hashes, notes, fetch, online
        self.looked_up: dict[Path, Mapping[str, Header]] = {}
        """Folder with the small files of a model on the Hub → the headers of its weights, by the names of their files.
        """
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

    def _base(self, reference: str, report: Callable[[str], None]) -> PlacedModel | None:
        """A model that no stage makes: a folder by the hashes of its files, a Hub model by its pinned revision.

        With adapters on it, it is as an earlier stage would have left it.
        """
        try:
            parts = self._parts(chain_of(reference))
            return self._placed(reference, parts)
        except StageError as error:
            report(str(error))
            return None

    def _parts(self, names: Sequence[str]) -> dict[str, Path | None]:
        """Name → folder of a base and of the adapters on it, in their order; None where it is not on this machine.

        An adapter that comes first brings the model that it was trained on, which may have adapters itself.

        Raises:
            StageError: a folder cannot be found, or an adapter does not say what it was trained on.
        """
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise StageError(f"`{twice}` is in the list twice; write it once")
        found = {name: self._locate(name) for name in names}
        first, folder = next(iter(found.items()))
        while folder is not None and is_adapter(folder, self.looked_up.get(folder, ())):
            before = _recorded(folder) or [base_of(first, folder)]
            if set(before) & found.keys():
                raise StageError(f"the adapter `{first}` was trained on itself, as it says; name its base first")
            found = {name: self._locate(name) for name in before} | found
            first, folder = next(iter(found.items()))
        return found

    def _locate(self, name: str) -> Path | None:
        """The folder of a model, or with `online` one with its small files alone; None if it is not on this machine.

        Raises:
            StageError: the folder does not exist, or the Hub does not hand out the model.
        """
        folder = locate_model(name, download=self.fetch)
        if folder is None and self.online:
            folder, headers = look_up(name)
            self.looked_up[folder] = headers
        return folder

    def _placed(self, reference: str, parts: Mapping[str, Path | None]) -> PlacedModel:
        """
        Raises:
            StageError: a folder is damaged, or an adapter does not fit.
        """
        identities, content = list[str](), dict[str, str]()
        for name, folder in parts.items():
            files = {} if folder is None or is_hub_name(name) else self._content(folder)
            content |= files
            known = {Path(path).name: sha for path, sha in files.items()}
            identities.append("folder:" + digest(known) if files else f"hub:{name}")
        identity = identities[0] if len(parts) == 1 else "chain:" + digest(identities)
        whole = {name: folder for name, folder in parts.items() if folder is not None and folder not in self.looked_up}
        folders = [str(whole.get(name, name)) for name in parts]
        for name in (name for name in parts if name not in whole):
            self.notes.append(f"`{name}` is not on this machine; {self._unfetched(parts[name])}")
        if None in parts.values():
            return PlacedModel(folders, identity, Facts(f"`{reference}`", {}, known=False), content)
        (base, folder), *adapters = ((name, Path(folder)) for name, folder in parts.items() if folder is not None)
        facts = read_facts(folder, f"`{base}`", self.looked_up.get(folder))
        for name, folder in adapters:
            facts = with_adapter(facts, name, folder, self.looked_up.get(folder))
        return PlacedModel(folders, identity, replace(facts, source=f"`{reference}`"), content)

    def _unfetched(self, folder: Path | None) -> str:
        """What is known of a model that is not on this machine."""
        if folder is None:
            return "`run` fetches it, until then it is unchecked"
        stored = size_of(sum(size for _, size in self.looked_up[folder].values()))
        return f"its config, tokenizer and the shapes of its weights are checked, and `run` fetches {stored} of weights"

    def _content(self, folder: Path) -> dict[str, str]:
        """Path → sha256 of the files of a folder that stages read."""
        files = sorted(
            path for path in folder.iterdir() if path.suffix in KINDS and path.name not in artifact.NOT_CONTENT
        )
        return dict(zip(map(str, files), self.hashes.of(files), strict=True))


def _recorded(folder: Path) -> list[str]:
    """The folders below an adapter that a stage has left, as its record names them; empty if they are not there."""
    folders = list((artifact.read(folder) or {}).get("model") or [])[:-1]
    return folders if all(Path(name).is_dir() for name in folders) else []
