"""A model loaded from its folders, and the files that a stage hands on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import StageError
from stages.runtime.interfaces import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARRIED = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config",
)


def load_model(folders: Sequence[str], **settings: Any) -> "PreTrainedModel":
    """The model in evaluation mode, all adapters folded in; `settings` go to `from_pretrained` (dtype, …).

    Adapters are folded in the base's own dtype, as `merge` does, and the weights are cast afterwards.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from stages.model.lora import fold_into

    dtype = settings.pop("dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(
        folders[0],
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        dtype="auto" if folders[1:] else dtype,
        **settings,
    )
    fold_into(model, folders[1:])
    if folders[1:] and dtype != "auto":
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for parameter in model.parameters():  # not `model.to`: it would round buffers such as rotary frequencies
            parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    model.eval()
    return model


def load_tokenizer(folders: Sequence[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of the last folder (every artifact has one); without a pad token it pads with end-of-text.

    Raises:
        StageError: it has no end-of-text token, it is not a fast tokenizer, or the installed tokenizers cannot do what
            the stages need.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[-1], trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise StageError(f"the tokenizer of `{folders[-1]}` is not a fast one; save it with its tokenizer.json")
    require("transformers", tokenizer, "backend_tokenizer")
    backend = tokenizer.backend_tokenizer
    require(
        "tokenizers", backend, "encode_batch_fast", "encode_special_tokens", "no_padding", "no_truncation", "to_str"
    )
    if tokenizer.eos_token is None:
        raise StageError(f"the tokenizer of `{folders[-1]}` has no eos_token; set it in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def set_stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop where training taught it to: at the template's end of turn, and at end of text."""
    from stages.chat.encoder import Encoder
    from stages.chat.labels import end_of_turn

    stops = [end_of_turn(Encoder(tokenizer))] if tokenizer.chat_template else []
    known = model.generation_config.eos_token_id
    stops += known if isinstance(known, list) else [known]
    stops += [tokenizer.eos_token_id]
    unique = list(dict.fromkeys(stop for stop in stops if stop is not None))
    model.generation_config.eos_token_id = unique if len(unique) > 1 else unique[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def carried_files(folder: Path) -> list[Path]:
    """The files that travel unchanged from artifact to artifact: tokenizer, template, generation config."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(CARRIED))
