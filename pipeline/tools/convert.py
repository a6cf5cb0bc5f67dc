"""`pipeline convert`: files and commands of LLaMA-Factory, Axolotl, TRL, alignment-handbook and MedicalGPT → a config.

    convert(sources, out, dataset_info=None, commit_of=pinned_commit) -> Converted

* `sources`: YAML files, shell scripts, and command lines (one text, or its words), in the order of the chain.
* `out`: the path of the config that the caller will write. Templates go beside it.
* `dataset_info`: LLaMA-Factory's dataset_info.json, where it is not in `dataset_dir`.
* `Converted.text` is the YAML, `.files` maps paths of side files to their texts, `.notes` are sentences for the user.

Nothing is written here, and no command is run. Raises ConfigError with every reason if no stage is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.tools import convert_axolotl, convert_llamafactory, convert_medicalgpt, convert_trl
from pipeline.tools.convert_chain import root, title
from pipeline.tools.convert_datasets import CommitOf
from pipeline.tools.convert_hub import pinned_commit
from pipeline.tools.convert_parts import Book, Job, Note, Part
from pipeline.tools.convert_reading import jobs
from pipeline.tools.convert_yaml import document

HEADED = ("to do", "not supported", "differs")
"""Kinds of notes that the comment at the top of the config repeats."""


@dataclass(frozen=True)
class Converted:
    """A config, and what the user must know about it."""

    text: str
    """The YAML."""
    notes: Sequence[Note]
    """In this order: to do, not supported, differs, unknown, not needed."""
    files: Mapping[Path, str]
    """Files that the config names: path → text."""


def convert(
    sources: Sequence[str], out: Path, *, dataset_info: Path | None = None, commit_of: CommitOf = pinned_commit
) -> Converted:
    """Write down what the sources do as one config.

    `commit_of` finds the commit of a name on the Hub. The default asks the cache of this machine, then the Hub.

    Raises:
        ConfigError: a source cannot be read, or none of it becomes a stage.
    """
    book = Book(folder=out.parent)
    parts = [part for job in jobs(sources, book) for part in _parts(job, book, commit_of, dataset_info)]
    if not parts:
        reasons = [str(note) for note in book.notes if note.kind in HEADED]
        raise ConfigError([f"{title(sources)}: no stage can be written", *reasons])
    found = root(parts, book, commit_of)
    order = ("to do", "not supported", "differs", "unknown", "not needed")
    notes = sorted(book.notes, key=lambda note: order.index(note.kind))
    head = [f"Converted from {title(sources)}."]
    head += [f"{note.kind}: {note.text}" for note in notes if note.kind in HEADED]
    named = {part.template for part in parts}
    files = {Path(name): text for name, text in book.files.items() if name in named}
    return Converted(document(found, head), notes, files)


def _parts(job: Job, book: Book, commit_of: CommitOf, info: Path | None) -> list[Part]:
    """The stages of one command."""
    if job.program == "llamafactory":
        return convert_llamafactory.convert_job(job, book, commit_of, info)
    others = {
        "axolotl": convert_axolotl.convert_job,
        "trl": convert_trl.convert_job,
        "medicalgpt": convert_medicalgpt.convert_job,
    }
    return others[job.program](job, book, commit_of)
