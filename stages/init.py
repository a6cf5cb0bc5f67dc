"""A small model from nothing: an architecture, sizes and text in, an untrained model with its tokenizer out.

The demo and the tests use it, so they need no model hub. The weights are random, the same for the same `seed`; the
tokenizer is a byte-level BPE trained on the named data.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages import Metrics, Stage
from stages.chat.template import install_template
from stages.data.row import message_texts
from stages.data.source import Reading, Source
from stages.model.facts import Facts, Needs
from stages.model.folder import set_stop_tokens
from stages.model.inputs import Inputs
from stages.runtime.events import emit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# Special tokens of the built-in templates; with them every template works on these models.
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


class Config(BaseModel):
    """Settings of `init`, with the names of transformers' model configs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["bloom", "llama", "qwen2", "qwen3"]
    data: list[Source] = Field(min_length=1)
    """Names of declared data that the tokenizer is trained on."""
    hidden_size: int = Field(default=128, gt=0)
    num_hidden_layers: int = Field(default=2, gt=0)
    num_attention_heads: int = Field(default=4, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    """Not used by bloom. Default: `num_attention_heads`."""
    intermediate_size: int | None = None
    """Not used by bloom, which takes 4 × `hidden_size`. Default: 2 × `hidden_size`."""
    vocab_size: int = Field(default=2048, ge=300)
    max_position_embeddings: int = Field(default=1024, gt=0)
    tie_word_embeddings: bool = True
    template: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} is not a multiple of "
                f"`num_attention_heads` {self.num_attention_heads}"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} is not a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}"
            )
        return self

    @property
    def ffn(self) -> int:
        """The hidden size of the feed-forward layers."""
        return 4 * self.hidden_size if self.architecture == "bloom" else self.intermediate_size or 2 * self.hidden_size


def facts(config: Config, _: Facts) -> Facts:
    """What later stages can know of the model before it is built."""
    embeddings = "transformer.word_embeddings" if config.architecture == "bloom" else "model.embed_tokens"
    weights = {f"{embeddings}.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        weights.update({f"{name}.weight": shape for name, shape in _layer(config, layer).items()})
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    shown = {"model_type": config.architecture, "vocab_size": config.vocab_size, **_sizes(config)}
    tokenizer = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    known = "".join(f'"{token}"' for token in SPECIAL + MARKS)
    built = Facts("the model that `init` makes", shown, weights, known, tokenizer, config.template)
    return replace(built, stored=4 * built.parameters)


def needs(config: Config, _: Facts) -> Needs:
    """Memory and disk: the matrices in float32; a text that is too short for `vocab_size` needs less."""
    size = facts(config, _).stored
    return Needs(size, size)


def _layer(config: Config, layer: int) -> dict[str, tuple[int, int]]:
    """Name → shape (outputs × inputs) of the linear modules of a layer."""
    hidden, ffn = config.hidden_size, config.ffn
    if config.architecture == "bloom":
        prefix = f"transformer.h.{layer}"
        attention = {"query_key_value": (3 * hidden, hidden), "dense": (hidden, hidden)}
        mlp = {"dense_h_to_4h": (ffn, hidden), "dense_4h_to_h": (hidden, ffn)}
        attention_name = "self_attention"
    else:
        prefix = f"model.layers.{layer}"
        kv = hidden // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
        attention = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
        attention_name = "self_attn"
    named = {f"{prefix}.{attention_name}.{name}": shape for name, shape in attention.items()}
    return named | {f"{prefix}.mlp.{name}": shape for name, shape in mlp.items()}


def headline(metrics: Mapping[str, Any]) -> str:
    """The numbers of parameters and tokens."""
    return f"{metrics['parameters'] / 1e6:.2f}M parameters, {metrics['vocab_size']} tokens"


def describe(config: Config) -> list[str]:
    """Architecture and sizes."""
    names = ("architecture", "hidden_size", "num_hidden_layers", "seed")
    return [f"{name} {getattr(config, name)}" for name in names]


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Build model and tokenizer, and save both in `out`."""
    from transformers import AutoModelForCausalLM, set_seed

    tokenizer = _tokenizer(config, [inputs.read(source) for source in config.data])
    install_template(tokenizer, config.template)
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(_architecture(config, tokenizer))
    set_stop_tokens(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    emit(out, "note", text=f"{config.architecture} with {model.num_parameters():,} parameters")
    return {"parameters": model.num_parameters(), "vocab_size": len(tokenizer)}


def _architecture(config: Config, tokenizer: "PreTrainedTokenizerFast") -> Any:
    from transformers import AutoConfig

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return AutoConfig.for_model(config.architecture, vocab_size=len(tokenizer), **ids, **_sizes(config))


def _sizes(config: Config) -> dict[str, Any]:
    """The sizes of the model, with the names of its config.json."""
    shared = {"hidden_size": config.hidden_size, "tie_word_embeddings": config.tie_word_embeddings}
    heads = config.num_attention_heads
    if config.architecture == "bloom":
        return {
            **shared,
            "n_layer": config.num_hidden_layers,
            "n_head": heads,
            "seq_length": config.max_position_embeddings,
        }
    return {
        **shared,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.max_position_embeddings,
        "head_dim": config.hidden_size // heads,
    }


def _tokenizer(config: Config, sources: Sequence[Source]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE without a normalizer, so that decoding gives the text back byte for byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=SPECIAL + MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(sources), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _texts(sources: Sequence[Source]) -> Iterator[str]:
    """All text in the rows, to train the tokenizer on."""
    for source in sources:
        for _, row in Reading(source).kept():
            if "text" in row:
                yield row["text"]
            for key in ("messages", "prompt", "chosen", "completion"):
                yield from (text for message in row.get(key, []) for text in message_texts(message))
            if "tools" in row:
                yield json.dumps(row["tools"], ensure_ascii=False)


STAGE = Stage(
    version=2,
    config=Config,
    run=run,
    headline=headline,
    needs=needs,
    more_memory=lambda config: "lower `hidden_size` or `num_hidden_layers`, or set `max_samples` of its data",
    facts=facts,
    describe=describe,
)
