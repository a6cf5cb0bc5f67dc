"""A model on the Hub is looked up: its small files, and the headers of its weights; the weights stay where they are."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.model.adapters import WEIGHTS, is_adapter
from stages.model.facts import Header, weight_files
from stages.runtime.errors import StageError
from stages.runtime.hub import failures, refusal

SMALL = ("*.json", "*.jinja")  # config, tokenizer, chat template, index of the weights


def look_up(model: str) -> tuple[Path, dict[str, Header]]:
    """The folder of the Hub's cache with the small files of `org/name@revision`, and file name → header of its weights.

    A header is read with one request for the first 100 kB of a file, a second one where it is longer; nothing of it is
    kept. An adapter has one such file. https://huggingface.co/docs/safetensors/metadata_parsing describes the requests.

    Raises:
        StageError: the Hub cannot be reached, does not hand out the model, or the model has no safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*SMALL]))
        # By the commit, which is the folder's name: a branch may have moved since.
        names = HfApi().list_repo_files(name, revision=folder.name)
        files = [WEIGHTS] if is_adapter(folder, names) and WEIGHTS in names else _names(weight_files(folder, names))
        if not files:
            raise StageError(_no_weights(model, names))
        with ThreadPoolExecutor(max_workers=8) as pool:
            headers = list(pool.map(lambda file: _header(name, file, folder.name), files))
    except failures() as error:
        raise StageError(f"the Hub does not hand out `{model}` {refusal(error)}") from None
    return folder, dict(zip(files, headers, strict=True))


def _names(files: Iterable[Path]) -> list[str]:
    return [file.name for file in files]


def _header(name: str, file: str, commit: str) -> Header:
    from huggingface_hub import HfApi

    tensors = HfApi().parse_safetensors_file_metadata(name, file, revision=commit).tensors
    shapes = {weight: tuple(tensor.shape) for weight, tensor in tensors.items()}
    return shapes, max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)


def _no_weights(model: str, names: Iterable[str]) -> str:
    pickle = next((name for name in sorted(names) if name.endswith(".bin")), None)
    found = f" (`{pickle}` is a pickle, which can run code)" if pickle else ""
    return f"`{model}` has no .safetensors weights{found}; name a commit that has them, or convert it to a folder"
