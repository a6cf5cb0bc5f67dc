"""The commands with which a project begins: convert what another tool has."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pipeline.commands.app import SAVES, AsJson, Saves, argument, command, option, print_json

Out = Annotated[Path, option("--out", metavar="FILE", help="The YAML file to write.")]
Force = Annotated[bool, option("--force", help="Replace the file if it is there.")]


@command("Start", "init --model models/qwen --data qa.csv")
def init(
    out: Annotated[Path, argument(metavar="FILE", help="The YAML file to write (default: pipeline.yaml).")] = Path(
        "pipeline.yaml"
    ),
    model: Annotated[
        str | None,
        option("--model", metavar="MODEL", help="A folder, or NAME@COMMIT (default: a tiny one)."),
    ] = None,
    data: Annotated[
        list[str] | None, option("--data", metavar="PATH", help="A file or folder with rows; may be repeated.")
    ] = None,
    template: Annotated[str | None, option("--template", metavar="NAME", help="The chat template.")] = None,
    question: Annotated[
        str | None, option("--question", metavar="TEXT", help="Asked of the models at the end of a run.")
    ] = None,
    bits: Annotated[bool, option("--quantize/--no-quantize", help="Whether to end in 4 bits (default: yes).")] = True,
    force: Force = False,
) -> int:
    """Write a config for your model and data; at a terminal it asks for what is missing."""
    from pipeline.tools import scaffold

    print(scaffold.machine())
    paths = list(data or [])
    if sys.stdin.isatty() and not paths:
        model = model or _asked("model (a folder, or NAME@COMMIT on the Hub; empty: a tiny one made on the spot)")
        while path := _asked("data file or folder (empty: no more)"):
            print(*(one.words for one in scaffold.look_into([path])))
            paths.append(path)
        question = question or _asked("a question to ask the models at the end (may be empty)")
    found = scaffold.look_into(paths)
    for one in found:
        print(one.words)
    text = scaffold.write(model, found, template, question, bits=bits)
    for path in write_new({out: text}, force=force, named=""):
        print(f"wrote {path}")
    print(f"next: pipeline plan {out}")
    return 0


def _asked(what: str) -> str | None:
    """What the user types; None for nothing."""
    return input(f"{what}: ").strip() or None


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


@command("Start", "schema --out schema.json")
def schema(
    out: Annotated[
        Path | None, option("--out", metavar="FILE", help="The file to write (default: the terminal).")
    ] = None,
) -> int:
    """Write the JSON Schema of a config, with which editors complete and check."""
    from pipeline.config.schema import schema as config_schema

    text = json.dumps(config_schema(), ensure_ascii=False, indent=1) + "\n"
    if out is None:
        print(text, end="")
        return 0
    for path in write_new({out: text}, force=True):
        print(f"wrote {path}; begin a config with `# yaml-language-server: $schema={path}`")
    return 0


@command("Inspect", "doctor")
def doctor(saves: Saves = SAVES, as_json: AsJson = False) -> int:
    """Look at packages, GPU, memory, disk and the Hub, and name a cure for what is wrong."""
    from pipeline.tools import doctor as examination
    from pipeline.views import tables

    found = examination.examine(saves)
    if as_json:
        return print_json([asdict(finding) for finding in found])
    tables.print_findings([(finding.what, finding.state, finding.text, finding.cure) for finding in found])
    return int(any(finding.state == "wrong" for finding in found))


def write_new(files: dict[Path, str], *, force: bool, named: str = "--out ") -> list[str]:
    """Write files; returns their paths. `named` stands before a path in a message, as on the command line.

    Raises:
        ConfigError: a file is there already, or a folder is not.
    """
    from pipeline.errors import ConfigError

    there = [path for path in files if path.exists()]
    if there and not force:
        raise ConfigError(
            [f"{named}{path}: is there already; name another file, or replace it with --force" for path in there]
        )
    for path, text in files.items():
        if not path.parent.is_dir():
            raise ConfigError([f"{named}{path}: there is no folder `{path.parent}`"])
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in files]
