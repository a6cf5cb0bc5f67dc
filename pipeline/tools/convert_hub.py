"""The commit of a name on the Hub: of the copy on this machine, or of the Hub's main branch."""

import os
from pathlib import Path

from stages.runtime.hub import failures


def pinned_commit(kind: str, name: str) -> str | None:
    """The commit of `model` or `dataset` `name`: of the copy here, else of the Hub; None without either.

    The copy comes first because it is what was trained with.
    """
    return local_commit(kind, name) or hub_commit(kind, name)


def local_commit(kind: str, name: str) -> str | None:
    """The commit that the main branch had when the copy on this machine was fetched."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    try:
        return (cache / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def hub_commit(kind: str, name: str) -> str | None:
    """The newest commit on the Hub; None if the Hub cannot be reached, or does not know the name."""
    from huggingface_hub import HfApi

    try:
        commit: str | None = HfApi().repo_info(name, repo_type=kind, timeout=10).sha
        return commit
    except failures():
        return None
    except ValueError:  # no name of a repository
        return None
