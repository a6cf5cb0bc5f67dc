"""Values that must not be written down: tokens come from the environment and stay there."""

import json
import os
import re
from pathlib import Path

from pipeline.errors import StageFailed

_NAMES = re.compile(r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_SPECIAL = re.compile(r"<[^<>]+>|\[[A-Z_]+\]")
_SHORTEST = 8  # shorter values, such as `true` in TOKENIZERS_PARALLELISM, are not secrets
_TEXTS = {".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".csv", ".yaml"}
HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")  # the runner downloads; stages are offline


def values() -> dict[str, str]:
    """Each secret value in the environment, also as it is written in JSON, and the name of its variable."""
    named = {value: name for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    # A plain word, a number such as a limit on tokens, a template's token such as <|im_end|>, and the path of a key
    # file are not secrets.
    plain = {value for value in named if value.isdigit() or value.isalpha() or os.path.exists(value)}
    plain |= {value for value in named if _SPECIAL.fullmatch(value)}
    secrets = {value: name for value, name in named.items() if value not in plain}
    in_json = {
        json.dumps(value, ensure_ascii=ascii_only)[1:-1]: name
        for value, name in secrets.items()
        for ascii_only in (True, False)
    }
    return secrets | in_json


def mask(text: str) -> str:
    """The text with every secret value replaced by the name of its variable, longer values first."""
    for value, name in sorted(values().items(), key=lambda item: -len(item[0])):
        text = text.replace(value, f"<{name}>")
    return text


def found_in(text: str) -> str | None:
    """The name of a variable whose secret value is in the text; None when there is none."""
    return next((name for value, name in values().items() if value in text), None)


def mask_file(path: Path) -> None:
    """Mask a log in place; one without a secret in it is not touched."""
    secrets = values()
    if not secrets or not path.is_file():
        return
    content = path.read_bytes()
    if any(value.encode() in content for value in secrets):
        path.write_bytes(mask(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape"))


def forbid(folder: Path, stage: str) -> None:
    """Check the text files of a folder, which would be handed on with the model.

    Raises:
        StageFailed: a file holds a secret.
    """
    secrets = values()
    for path in sorted(folder.rglob("*")) if secrets else []:
        if path.suffix in _TEXTS and path.is_file():
            content = path.read_bytes()
            for value, name in secrets.items():
                if value.encode() in content:
                    raise StageFailed(
                        f"stage `{stage}`: `{path}` holds the value of the environment variable {name}; take it out of "
                        f"the data or the settings, or `unset {name}` if it is not a secret, and run again"
                    )
