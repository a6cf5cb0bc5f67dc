"""Models and tokenizers loaded from their folders, and the files that every stage copies to its own folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat.template import install_template
from stages.runtime.errors import StageError
from stages.runtime.interfaces import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Beginnings of the names of files that go unchanged from model folder to model folder.
CARRIED = (
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges"),
    *("chat_template", "generation_config"),
)


def load_model(folders: Sequence[str], **settings: Any) -> "PreTrainedModel":
    """The model of some folders (the base, then its adapters), in evaluation mode, with the adapters folded in.

    `settings` go to `from_pretrained`; `dtype` is float32 unless they have another. Adapters are folded in the dtype of
    the base, as `merge` does, and the weights are cast afterwards. With the setting `quantized_base` the linear layers
    are quantized between the two; the model then has the attribute `quantized_base` (`QuantizedBase`).

    Raises:
        StageError: the base lacks weights, an adapter does not fit it, or bitsandbytes cannot be imported.
    """
    model, missing = load_with_missing(folders, **settings)
    refuse_missing(folders[0], missing)
    return model


def refuse_missing(folder: str, missing: Sequence[str]) -> None:
    """
    Raises:
        StageError: a model folder lacks weights, which transformers made up at random.
    """
    if missing:
        named = ", ".join(f"`{name}`" for name in missing[:3])
        more = f" and {len(missing) - 3} more" if missing[3:] else ""
        raise StageError(
            f"the model folder `{folder}` lacks weights, which would be random: {named}{more}; fetch it again, or save "
            "the whole model again with `save_pretrained`"
        )


def load_with_missing(folders: Sequence[str], **settings: Any) -> tuple["PreTrainedModel", list[str]]:
    """As `load_model`; also the names of weights that the base folder lacks, which transformers made up at random."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.model.lora import fold_into, one_thread
    from stages.model.quantized import quantize

    dtype, method = settings.pop("dtype", "float32"), settings.pop("quantized_base", None)
    as_stored = bool(folders[1:] or method)
    model, info = AutoModelForCausalLM.from_pretrained(
        folders[0],
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        dtype="auto" if as_stored else dtype,
        **settings,
    )
    fold_into(model, folders[1:])
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if method is not None:
        with one_thread():
            model.quantized_base = quantize(model, method, wanted)
    if as_stored and dtype != "auto":
        for parameter in model.parameters():  # not `model.to`: it would round buffers such as rotary frequencies
            if parameter.is_floating_point():  # a quantized weight is not
                parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    model.eval()
    return model, sorted(info["missing_keys"])


def tokenizer_folder(folders: Sequence[str | Path]) -> Path:
    """The folder with the tokenizer of a model: the last one that has a tokenizer.json.

    Every folder that a stage leaves has one; an adapter from elsewhere may lack it.
    """
    paths = [Path(folder) for folder in folders]
    return next((path for path in reversed(paths) if (path / "tokenizer.json").is_file()), paths[-1])


def load_tokenizer(folders: Sequence[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of the last folder that has one; without a pad token it pads with end-of-text.

    Raises:
        StageError: it has no end-of-text token, it is not a fast tokenizer, or the installed tokenizers cannot do what
            the stages need.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(folders)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise StageError(f"the tokenizer of `{folder}` is not a fast one; save it with its tokenizer.json")
    require("transformers", tokenizer, "backend_tokenizer")
    backend = tokenizer.backend_tokenizer
    require(
        "tokenizers", backend, "encode_batch_fast", "encode_special_tokens", "no_padding", "no_truncation", "to_str"
    )
    if tokenizer.eos_token is None:
        raise StageError(f"the tokenizer of `{folder}` has no eos_token; set it in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    install_template(tokenizer, None)
    return tokenizer


def set_stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop at the template's end of turn, with which training ends an answer, and at end of text."""
    from stages.chat.encoder import Encoder
    from stages.chat.labels import end_of_turn

    stops = [end_of_turn(Encoder(tokenizer))] if tokenizer.chat_template else []
    known = model.generation_config.eos_token_id
    stops += known if isinstance(known, list) else [known]
    stops += [tokenizer.eos_token_id]
    unique = list(dict.fromkeys(stop for stop in stops if stop is not None))
    model.generation_config.eos_token_id = unique if len(unique) > 1 else unique[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def carried_files(*folders: Path) -> list[Path]:
    """The files of a model that go unchanged from stage to stage: tokenizer, template, generation config.

    Args:
        folders: the base, then the adapters on it. The tokenizer with its template comes from one folder; a generation
            config that this folder lacks comes from the last one that has it.
    """
    found = {
        path.name: path for folder in folders for path in folder.iterdir() if path.name.startswith("generation_config")
    }
    last = tokenizer_folder(folders)
    found |= {path.name: path for path in last.iterdir() if path.is_file() and path.name.startswith(CARRIED)}
    return [found[name] for name in sorted(found)]
