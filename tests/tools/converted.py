"""A config of another program, converted, and what became of it."""

from pathlib import Path

from pipeline.config.checker import load_config
from pipeline.tools.convert import convert

COMMIT = "1" * 40


def written(*sources, out="out.yaml", **more):
    """The converted config, written to a file with its side files, and its pipeline as `validate` reads it."""
    found = convert([str(source) for source in sources], Path(out), commit_of=lambda kind, name: COMMIT, **more)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(found.text, encoding="utf-8")
    for path, text in found.files.items():
        path.write_text(text, encoding="utf-8")
    return found, load_config(Path(out))


def stages(pipeline):
    """Stage → what it starts from and its settings, as they were read."""
    return {stage.name: stage for stage in pipeline.stages}


def notes(found, *kinds):
    """The texts of the notes of these kinds."""
    return [note.text for note in found.notes if note.kind in kinds]
