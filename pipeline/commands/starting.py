"""The commands with which a project begins: convert what another tool has."""

from pathlib import Path
from typing import Annotated

from pipeline.commands.app import AsJson, argument, command, option, print_json

Out = Annotated[Path, option("--out", metavar="FILE", help="The YAML file to write.")]
Force = Annotated[bool, option("--force", help="Replace the file if it is there.")]


@command("Start", "convert sft.yaml dpo.yaml --out chain.yaml")
def convert(
    sources: Annotated[
        list[str],
        argument(metavar="SOURCES", help="Files or command lines, in their order; several become one chain."),
    ],
    out: Out = Path("converted.yaml"),
    dataset_info: Annotated[
        Path | None, option("--dataset-info", metavar="FILE", help="LLaMA-Factory's dataset_info.json.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Turn files or commands of LLaMA-Factory, Axolotl, TRL or MedicalGPT into a config."""
    from pipeline.tools.convert import convert as converted

    found = converted(sources, out, dataset_info=dataset_info)
    written = write_new({out: found.text, **found.files}, force=force)
    if as_json:
        return print_json(
            {"written": written, "notes": [{"kind": note.kind, "text": str(note)} for note in found.notes]}
        )
    for note in found.notes:
        print(note)
    print(*(f"wrote {path}" for path in written), sep="\n")
    print(f"next: pipeline plan {out}")
    return 0


def write_new(files: dict[Path, str], *, force: bool) -> list[str]:
    """Write files; returns their paths.

    Raises:
        ConfigError: a file is there already, or a folder is not.
    """
    from pipeline.errors import ConfigError

    there = [path for path in files if path.exists()]
    if there and not force:
        raise ConfigError(
            [f"--out {path}: is there already; name another file, or replace it with --force" for path in there]
        )
    for path, text in files.items():
        if not path.parent.is_dir():
            raise ConfigError([f"--out {path}: there is no folder `{path.parent}`"])
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in files]
