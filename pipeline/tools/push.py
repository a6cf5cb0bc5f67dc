"""A finished stage in, its files in a model repository of the Hub out. What would be uploaded is listed first.

`record.json` and the log stay here: they name folders, times and the machine. The card has what readers need of them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import secret
from pipeline.errors import ConfigError, StageFailed
from pipeline.plan.models import KINDS
from pipeline.plan.step import Plan, Step, gate_verdicts
from pipeline.run import card
from pipeline.saves import artifact
from pipeline.serve import models
from stages.model.facts import HUB_NAME, is_hub_name
from stages.runtime.errors import StageError
from stages.runtime.figures import size_of
from stages.runtime.hub import TOKEN, failures, refusal

MAIN = "main"
ADAPTER = "adapter_config.json"
UNREAD = ("tokenizer.json", "vocab.json")  # tokens, which may look like paths
_PATH = re.compile(r"/[^\s/]+/\S+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class File:
    """A file of the stage."""

    path: str
    """Its name in the repository."""
    content: Path | bytes
    size: int
    sha256: str
    state: str = "new"
    """`new`, `changed`, or `same` for a file that the repository has."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What would be uploaded, and to which repository."""

    title: str
    """The first heading of the model card."""
    repository: str
    branch: str
    exists: bool
    new_branch: bool
    private: bool
    files: list[File]
    removed: list[str] = field(default_factory=list)
    """Files of the repository that a program would load with the model, and that the stage does not have."""
    notes: list[str] = field(default_factory=list)

    @property
    def uploads(self) -> list[File]:
        return [file for file in self.files if file.state != "same"]

    @property
    def size(self) -> int:
        """Bytes to upload."""
        return sum(file.size for file in self.uploads)

    def lines(self) -> Iterator[str]:
        """The dry run, for people."""
        seen = "private" if self.private else "public"
        state = f"exists, {seen}" if self.exists else f"will be made, {seen}"
        branch = "" if self.branch == MAIN else f", branch `{self.branch}`{' (new)' if self.new_branch else ''}"
        yield f"card        {self.title}"
        yield f"repository  {self.repository} ({state}{branch})"
        for file in self.files:
            yield f"  {file.state:8}{size_of(file.size):>10}  {file.path}"
        yield from (f"  {'delete':20}{path}" for path in self.removed)
        yield from (f"note: {note}" for note in self.notes)


def check_config(config: Path) -> None:
    """Refuse a folder: without its config nobody can say whether its files are those that the stage left.

    Raises:
        ConfigError: `config` is a folder.
    """
    if not config.is_dir():
        return
    record = artifact.read(config)
    if record is None:
        text = "is a folder that no stage made; `push` uploads a stage of a config, and `hf upload ORG/NAME` any folder"
    else:
        text = f"is a folder; name the config that made it, with `--stage {record['stage']}`"
    raise ConfigError([f"{config}: {text}"])


def check_request(to: str, branch: str) -> str:
    """The token for an upload.

    Raises:
        ConfigError: the repository or the branch is no name of one, or there is no token.
    """
    problems = []
    if not HUB_NAME.match(to) or "@" in to:
        problems.append(f"--to {to}: is not a repository; write it as `org/name`, and a branch as `--revision BRANCH`")
    if _COMMIT.fullmatch(branch):
        problems.append(f"--revision {branch}: is a commit, and files are added to a branch; name a branch")
    token = os.environ.get(TOKEN, "")
    if not token:
        problems.append(f"{TOKEN} is not set; `push` needs a token with the right to write, in that variable alone")
    if problems:
        raise ConfigError(problems)
    return token


def finished_step(plan: Plan, stage: str | None) -> Step:
    """The step whose model is to be pushed; the last finished one if no stage is named.

    Raises:
        ConfigError: there is no such stage, it is not finished, or it is an adapter whose base is not on the Hub.
    """
    served = models.of_plan(plan, stage)
    step = next((step for step in plan.steps if step.produces == list(served.folders)), None)
    if step is None:
        raise ConfigError([f"--stage {stage}: no stage made this model, so there is nothing of yours to push"])
    if step.entry.leaves_adapter and not _is_on_hub(step):
        below = plan.steps[plan.steps.index(step) + 1 :]
        whole = next((one.name for one in below if one.entry.leaves_model and not one.entry.leaves_adapter), None)
        way = f"push `--stage {whole}`" if whole else "add a `merge` stage below it, and push that one"
        base = f"`{step.inputs.model[0]}`" if len(step.inputs.model) == 1 else "other adapters"
        text = f"is an adapter on {base}, which nobody can load from the Hub"
        raise ConfigError([f"{plan.pipeline.path}: stage `{step.name}` {text}; {way}"])
    return step


def _is_on_hub(step: Step) -> bool:
    return len(step.inputs.model) == 1 and step.entry.start is not None and is_hub_name(step.entry.start)


def prepare(plan: Plan, step: Step, to: str, token: str, *, private: bool, branch: str) -> Push:
    """Check the stage's folder, compare it with the repository, and upload nothing.

    Raises:
        ConfigError: `private` is asked for, and the repository is public.
        StageFailed: a file of the folder has changed since the stage finished, or holds a secret.
        StageError: the Hub refuses the request or cannot be reached.
    """
    record = artifact.read(step.folder)
    damage = (
        "its record is gone" if record is None else artifact.damage(step.folder, record, plan.hashes, thorough=True)
    )
    plan.hashes.save()  # so that the next plan knows of a change that size and times did not show
    if record is None or damage is not None:
        way = f"`pipeline run {plan.pipeline.path} --until {step.name}` makes it again"
        raise StageFailed(f"stage `{step.name}`: `{step.folder}` is damaged ({damage}); nothing was uploaded; {way}")
    secret.forbid(step.folder, step.name)
    files = list(_files(plan, step, record))
    text = next(bytes_of(file).decode() for file in files if file.path == card.FILE)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), step.name)
    verdicts = (one for report in plan.reports if report.state == "done" for one in gate_verdicts(report, plan))
    notes = [f"a gate failed: {verdict.text}" for verdict in verdicts if not verdict.passed]
    with _asking(to):
        there, exists, public, new_branch = _look(to, token, branch)
    if private and public:
        raise ConfigError([f"--private: `{to}` exists and is public; make it private in its settings, or leave it out"])
    compared = [_compared(file, there) for file in files]
    own = {file.path for file in files}
    removed = [path for path in there if "/" not in path and Path(path).suffix in KINDS and path not in own]
    return Push(
        title=title,
        repository=to,
        branch=branch,
        exists=exists,
        new_branch=new_branch,
        private=private or (exists and not public),
        files=compared,
        removed=sorted(removed),
        notes=notes,
    )


@contextmanager
def _asking(to: str, then: str = "") -> Iterator[None]:
    """Turn a refusal of the Hub into a message, which `then` ends.

    Raises:
        StageError: the Hub refuses the request or cannot be reached.
    """
    try:
        yield
    except failures() as error:
        raise StageError(f"the Hub does not take `{to}` {refusal(error)}{then}") from None
    except RuntimeError as error:  # what went wrong in a thread that uploads is its cause
        if error.__cause__ is None:
            raise
        raise StageError(f"the Hub does not take `{to}` {refusal(error.__cause__)}{then}") from None
    except ValueError as error:  # such as a license in the card that the Hub does not know
        raise StageError(f"the Hub does not take `{to}`: {' '.join(str(error).split())}") from None


def _look(to: str, token: str, branch: str) -> tuple[dict[str, Any], bool, bool, bool]:
    """What the branch holds, as path → file of the Hub's list; whether the repository exists, whether it is public, and
    whether the branch is a new one, which starts as a copy of the main one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token)
    try:
        public = not api.model_info(to).private
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return {}, False, False, branch != MAIN
    try:
        return _listed(api, to, branch), True, public, False
    except RevisionNotFoundError:
        return _listed(api, to, MAIN), True, public, True


def _listed(api: Any, to: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(to, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


# The files of a stage


def _files(plan: Plan, step: Step, record: Mapping[str, Any]) -> Iterator[File]:
    """The files of a finished folder as they are uploaded, with a card where the stage has written none."""
    for name, entry in record["files"].items():
        content = _cleaned(step, name)
        if content is None:
            yield File(name, step.folder / name, entry["size"], entry["sha256"])
        else:
            yield _in_memory(name, content)
    if card.FILE not in record["files"]:
        yield _in_memory(card.FILE, _card(plan, step).encode())


def _in_memory(name: str, content: bytes) -> File:
    return File(name, content, len(content), hashlib.sha256(content).hexdigest())


def bytes_of(file: File) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def _cleaned(step: Step, name: str) -> bytes | None:
    """A JSON file without paths of this machine, an adapter's with the name of its base; None if it has none of them.

    Another path becomes its last part.
    """
    file = step.folder / name
    if file.suffix != ".json" or file.name in UNREAD:
        return None
    before = json.loads(file.read_text(encoding="utf-8"))
    after = _without_paths(before)
    if name == ADAPTER and step.entry.start is not None:
        base, _, commit = step.entry.start.partition("@")
        after |= {"base_model_name_or_path": base, "revision": commit or None}
    return None if after == before else (json.dumps(after, ensure_ascii=False, indent=2) + "\n").encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and _PATH.fullmatch(value) else value


def _card(plan: Plan, step: Step) -> str:
    """The model card of a stage that writes none."""
    done = [
        card.FinishedStep(above, (artifact.read(above.folder) or {}).get("metrics", {}))
        for above in plan.steps[: plan.steps.index(step) + 1]
        if above.state == "done"
    ]
    record = artifact.read(step.folder) or {}
    chain = card.lineage(done[-1], done[:-1])
    return secret.mask(card.render(chain, done[:-1], plan, record["versions"]))


def _compared(file: File, there: Mapping[str, Any]) -> File:
    """The file with its state: the Hub knows a file in LFS by its SHA-256, and another one by Git's name for it."""
    known = there.get(file.path)
    return file if known is None else replace(file, state="same" if _is_same(file, known) else "changed")


def _is_same(file: File, known: Any) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if known.lfs is not None:
        return bool(known.lfs.sha256 == file.sha256)
    return bool(known.size == file.size and known.blob_id == git_hash(bytes_of(file)))


# The upload


def upload(push: Push, token: str) -> str:
    """Make what is missing of the repository and the branch, and upload in one commit; returns its address.

    The Hub's list of files is compared with the stage's afterwards.

    Raises:
        StageError: the Hub refuses the request or cannot be reached, or a file arrived with other content.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with _asking(push.repository, "; `push` sends no file again that has arrived"):
        if not push.exists:
            api.create_repo(push.repository, private=push.private)
        if push.new_branch:
            api.create_branch(push.repository, branch=push.branch)
        commit = api.create_commit(
            push.repository,
            [
                *(CommitOperationAdd(file.path, file.content) for file in push.uploads),
                *(CommitOperationDelete(path) for path in push.removed),
            ],
            commit_message=push.title,
            revision=push.branch,
        )
        there = _listed(api, push.repository, commit.oid)
    other = [file.path for file in push.files if file.path not in there or not _is_same(file, there[file.path])]
    if other:
        raise StageError(f"`{other[0]}` arrived at `{push.repository}` with other content; push again")
    return str(commit.commit_url)
