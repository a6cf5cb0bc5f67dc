"""What is known of a model before it is loaded, read from `config.json` and from the headers of its safetensors."""

import contextlib
import json
import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.chat.template import template_names
from stages.chat.trial import Trial
from stages.model.positions import are_computed, sources
from stages.runtime.errors import Problem, StageError
from stages.runtime.files import refuse_pointer
from stages.runtime.hub import failures, refusal

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")

CHAIN = " + "  # between a base and the adapters on it

EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")  # of tokens, by their last name

SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)?(MB|GB|MiB|GiB)$"
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is loaded, or before it exists: of a model that an earlier stage will leave.

    Whatever is not known is empty, and is not checked.
    """

    source: str
    """The model in the words of the user, for messages: its folder, or the stage that leaves it."""
    config: Mapping[str, Any]
    """The content of config.json."""
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Weight name → shape."""
    tokens: str = ""
    """The text of tokenizer.json."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """The content of tokenizer_config.json."""
    template: str | None = None
    """The text of the model's own chat template."""
    known: bool = True
    """False for a Hub model that is not on this machine yet."""
    stored: int = 0
    """Bytes of the weights in the files."""
    adapters: int = 0
    """LoRA adapters that are folded in when the model is loaded."""
    added: tuple[str, ...] = ()
    """Tokens that a stage adds to the tokenizer."""

    @property
    def model_type(self) -> str:
        """The architecture in transformers' words, such as `bloom`."""
        return str(self.config.get("model_type", ""))

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.weights.values())

    @property
    def experts(self) -> int:
        """The number of experts of a mixture of experts; 0 for a dense model."""
        config = self.config.get("text_config") or self.config
        return max(int(config.get(name) or 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))

    @property
    def positions(self) -> int:
        """The positions that the model was made for, in tokens; 0 if its config names no number."""
        config = self.config.get("text_config") or self.config
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((int(config[name]) for name in names if config.get(name)), 0)

    @property
    def learned_positions(self) -> int:
        """`positions` of a model that has no others, learned or in a table; 0 for a model that computes positions."""
        return 0 if are_computed(self.model_type) else self.positions

    def too_long(self, length: int | None) -> str | None:
        """What is wrong with rows of `length` tokens at most, or of any length; None if the model can read them."""
        limit = self.learned_positions
        if not limit or (length is not None and length <= limit):
            return None
        given = "`max_length` is not set" if length is None else f"`max_length` is {length}"
        return f"{self.source} has {limit} positions, and {given}; write {limit}"

    def has_token(self, token: str) -> bool:
        """Whether the tokenizer knows a text as one token; True if the tokenizer is not known."""
        return not self.tokens or token in self.added or json.dumps(token, ensure_ascii=False) in self.tokens

    def linear_modules(self) -> list[str]:
        """Names of the modules that a LoRA adapter can target: those of 2-D weights, without embeddings."""
        embeddings = ("embed", "wte", "wpe")
        return [
            name.removesuffix(".weight")
            for name, shape in self.weights.items()
            if name.endswith(".weight") and len(shape) == 2 and not any(word in name for word in embeddings)
        ]


NO_MODEL = Facts("no model", {}, known=False)


@dataclass(frozen=True)
class Needs:
    """Bytes that a stage takes at its peak: a lower bound, not a guarantee."""

    memory: int
    """On the GPU if there is one, else in main memory."""
    disk: int
    """All files below the folder of the stage at one time."""
    result: int | None = None
    """All files that stay when the stage is finished; None if that is the same as `disk`."""

    @property
    def left(self) -> int:
        """Bytes on the disk after the stage."""
        return self.disk if self.result is None else self.result


def parse_size(size: str) -> int:
    """The bytes of a size such as `2GB`, which matches `SIZE_PATTERN`."""
    unit = size.lstrip("0123456789.")
    return int(float(size.removesuffix(unit)) * _UNITS[unit])


def chain_of(reference: str) -> list[str]:
    """The folders or Hub names of a reference: a base, then the adapters on it, joined by `CHAIN`."""
    return [reference] if Path(reference).exists() else reference.split(CHAIN)


def is_hub_name(model: str) -> bool:
    """Whether this is `org/name` or `org/name@revision`, and not a folder on this machine."""
    return bool(HUB_NAME.match(model)) and Path(model).suffix not in FILES and not Path(model).exists()


FILES = {
    ".safetensors": "holds weights alone, and a model is a folder: weights, config.json and tokenizer.json",
    ".gguf": "is a model of llama.cpp, which cannot be trained; a model is a folder with .safetensors weights",
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt"),
        "is a pickle, which can run code; a model is a folder with .safetensors weights",
    ),
}
"""Files that are named as models, by their suffix: what is wrong with that."""


def _no_folder(model: str) -> str:
    """What is wrong with a model that is no folder, and what to write."""
    path = Path(model)
    if not path.is_file():
        return f"the model folder `{model}` does not exist; name a folder or a Hub model as `org/name@commit`"
    what = FILES.get(path.suffix.lower(), "is a file, and a model is a folder")
    whole = (path.parent / "config.json").is_file() and path.suffix == ".safetensors"
    return f"`{model}` {what}; " + (f"write `model: {path.parent}`" if whole else "name a folder or `org/name@commit`")


def locate_model(model: str, *, download: bool) -> Path | None:
    """The folder of a model: itself, or the snapshot of a Hub model on this machine.

    None if the snapshot is not on this machine and `download` is off.

    Raises:
        StageError: the folder does not exist, or the Hub cannot be reached or does not know the model.
    """
    if not is_hub_name(model):
        if not Path(model).is_dir():
            raise StageError(_no_folder(model))
        return Path(model)
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]  # README.md has the license
    wanted = {"revision": revision, "allow_patterns": patterns}
    refused: BaseException | None = None
    if download:  # even if there is a snapshot on this machine: it may lack some of these files
        try:
            return Path(snapshot_download(name, **wanted))
        except failures() as error:
            refused = error
    with contextlib.suppress(OSError):  # there is no snapshot on this machine, or a part of one
        folder = Path(snapshot_download(name, **wanted, local_files_only=True))
        if _has_weights(folder):
            return folder
    if refused is None:
        return None
    raise StageError(f"the Hub does not hand out `{model}` {refusal(refused)}") from None


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot has its weights; another program may have fetched the config or the tokenizer alone.

    huggingface_hub itself finds a part of a snapshot only if the list of its files is in the cache.
    """
    try:
        return bool(weight_files(folder)) or any(folder.glob("*.bin"))
    except StageError:
        return False


Header = tuple[dict[str, tuple[int, ...]], int]
"""Weight name → shape, and the bytes of all weights, of a safetensors file."""


def read_facts(folder: Path, source: str = "", headers: Mapping[str, Header] | None = None) -> Facts:
    """Read the facts of a model folder, without torch; `source` is its name in messages, the folder by default.

    `headers`: file name → header of the weights of a model on the Hub, of which the folder has the small files alone.

    Raises:
        StageError: a file is missing, damaged or a pointer of Git LFS, or the model needs code that transformers does
            not have.
    """
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.jinja"))):
        refuse_pointer(file)
    if not (folder / "config.json").is_file():
        raise StageError(_no_model(folder))
    config = read_json(folder / "config.json", "")
    if "auto_map" in config and not sources(str(config.get("model_type", ""))):
        kind = config.get("model_type")
        raise StageError(
            f"the model folder `{folder}` contains its own code, and transformers has no `{kind}`; code from models "
            "is never run, so use a model that transformers supports"
        )
    if headers is None:
        files = weight_files(folder)
        for shard in files:
            refuse_pointer(shard)
        headers = {shard.name: read_header(shard) for shard in files}
    if not headers:
        other = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        found = f" (`{other}` is a pickle, which can run code)" if other else ""
        raise StageError(
            f"the model folder `{folder}` has no .safetensors weights{found}; convert it with `save_pretrained`"
        )
    weights: dict[str, tuple[int, ...]] = {}
    stored = 0
    for shapes, size in headers.values():
        weights.update(shapes)
        stored += size
    return Facts(source or str(folder), config, weights, *read_tokenizer(folder), stored=stored)


def read_tokenizer(folder: Path) -> tuple[str, dict[str, Any], str | None]:
    """The text of tokenizer.json, the content of tokenizer_config.json, and the text of the chat template, if any.

    Raises:
        StageError: a file is missing or damaged.
    """
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise StageError(
            f"the model folder `{folder}` has no tokenizer.json; save its fast tokenizer beside the weights"
        )
    settings = read_json(folder / "tokenizer_config.json", f"the model folder `{folder}` has no tokenizer_config.json")
    template = folder / "chat_template.jinja"
    own = _read(template) if template.is_file() else settings.get("chat_template")
    return _read(tokenizer), settings, own


def _no_model(folder: Path) -> str:
    """What is wrong with a folder without config.json, and the nearest folder that has one."""
    text = f"the model folder `{folder}` has no config.json; it is not a transformers model"
    inside = [path.parent for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/config.json"))]
    if inside:
        return f"{text}, and `{inside[-1]}` below it may be one"
    gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    return text if gguf is None else f"{text}, and `{gguf}` {FILES['.gguf']}"


def weight_files(folder: Path, names: Collection[str] | None = None) -> list[Path]:
    """The weight files: those of the index; without an index `model.safetensors`, or else every .safetensors file.

    `names`: the files of the folder, for a folder on the Hub; those on the disk by default.

    Raises:
        StageError: the index is damaged, or names a file that is missing.
    """
    there = {path.name for path in folder.iterdir() if path.is_file()} if names is None else set(names)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.name in there:
        mapped = read_json(index, "").get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise StageError(f"`{index}` names no weight files; fetch it again")
        files = sorted({folder / str(name) for name in mapped.values()})
        for file in files:
            if file.name not in there:
                raise StageError(
                    f"the model folder `{folder}` lacks `{file.name}`, which its index names; fetch it again"
                )
        return files
    if single.name in there:
        return [single]
    return sorted(folder / name for name in there if name.endswith(".safetensors") and "/" not in name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StageError(f"`{path}` is not UTF-8; fetch it again") from None


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The content of a JSON file; `missing` is the message if there is none.

    Raises:
        StageError: the file is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise StageError(missing) from None
    except (ValueError, TypeError, OSError) as error:
        raise StageError(f"`{path}` cannot be read ({error})") from None


def read_header(shard: Path) -> Header:
    """Weight name → shape, and the bytes of all weights, of a safetensors file.

    The file has 8 bytes with the length of the header, the header as JSON, and the weights
    (https://github.com/huggingface/safetensors#format).

    Raises:
        StageError: the file is damaged or cut off.
    """
    try:
        with open(shard, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        whole = 8 + length + stored
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError, OverflowError):
        raise StageError(f"`{shard}` is not a whole safetensors file; fetch it again") from None
    if shard.stat().st_size != whole:
        raise StageError(f"`{shard}` is cut off: {shard.stat().st_size:,} bytes of {whole:,}; fetch it again")
    return shapes, stored


def check_template(template: str | None, facts: Facts) -> list[Problem]:
    """Problems of the chat template that a stage will use with this model's tokenizer."""
    text = template or facts.template
    if text is None and not facts.known:
        return []
    if text is None:
        names = ", ".join(f"`{name}`" for name in template_names())
        return [
            (
                "",
                f"{facts.source} has no chat template; set `template:` at the top to one of {names}, or a file",
            )
        ]
    if facts.known and not facts.tokenizer.get("eos_token"):
        return [("model", f"the tokenizer of {facts.source} has no eos_token; set it in its tokenizer_config.json")]
    if not facts.known:
        return []
    trial = Trial(text, facts.tokenizer, facts.has_token)
    try:
        lost = trial.unknown(ANY_DATA)
    except StageError as error:
        return [("template", str(error))]
    refusals = [trial.refusal(shape) for shape in ANY_DATA]
    if not lost:
        return [] if None in refusals else [("template", str(refusals[0]))]
    return [unknown_marks(lost, facts)]


ANY_DATA = ("u a", "u ak")
"""Shapes of conversations, of which a template can be used for one at least: an answer, and one with a thought."""


def unknown_marks(lost: Sequence[str], facts: Facts) -> Problem:
    """The problem of a template that writes special tokens that the tokenizer does not have."""
    shown = ", ".join(f"`{token}`" for token in lost)
    listed = ", ".join(json.dumps(token, ensure_ascii=False) for token in lost)
    return (
        "template",
        f"the template writes {shown}, which the tokenizer of {facts.source} does not know as one token; write "
        f"`add_tokens: [{listed}]` at the top, or choose `med`, `alpaca_zh` or `plain`, which end a turn with the "
        "model's own eos_token",
    )
