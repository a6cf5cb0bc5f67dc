"""The engine: a model that answers as it is served, for evaluation, for the question after a run, and for servers.

What was trained is what is served: the weights in the dtype that they are stored in, with adapters folded in, the
tokenizer with its chat template, and generation that stops at the tokens with which training ended an answer.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat.encoder import Encoder
from stages.chat.rendering import render
from stages.chat.template import install_template
from stages.data.row import Message, Tools
from stages.model import inference
from stages.model.device import on_gpus, torch_device
from stages.model.folder import load_tokenizer, load_with_missing, set_stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
TOKENS = 4096  # of prompts and answers in memory at once, if the caller sets no other number


@dataclass(frozen=True)
class Engine:
    """A model and its tokenizer with the chat template."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    missing: Sequence[str] = ()
    """Names of weights that the folder lacks, sorted. transformers made them up at random, so do not use the model."""

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes rows as training does."""
        return Encoder(self.tokenizer)

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> Ids:
        """The token ids of a conversation up to where the answer begins; without a chat template, of the last message.

        Raises:
            StageError: the chat template cannot render these roles, or it does not write tools or their calls.
        """
        if self.tokenizer.chat_template:
            text = render(self.tokenizer, list(messages), prompt=True, tools=tools)
            return self.encoder.token_ids([text])[0]
        return self.encoder.token_ids([messages[-1]["content"]], special=True)[0]

    def generate(
        self,
        prompts: Sequence[Ids],
        settings: Mapping[str, Any],
        *,
        tokens: int = TOKENS,
        report: Callable[[int], None] = lambda done: None,
    ) -> list[Ids]:
        """The token ids that the model generates after each prompt, up to and with the first stop token.

        `settings` and errors as in `inference.answers`; `tokens` are in memory at once; `report` gets the number of
        prompts done.
        """
        return inference.answers(self.model, self.tokenizer, prompts, tokens, report, settings=settings)

    def stopped(self, ids: Ids) -> bool:
        """Whether the model ended an answer with a stop token; False for one that reached `max_new_tokens`."""
        return bool(ids) and ids[-1] in inference.stop_tokens(self.model)

    def text(self, ids: Ids) -> str:
        """The text of an answer, without special tokens and without blanks around it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        """The likeliest answer (greedy) to one conversation."""
        (ids,) = self.generate([self.prompt(messages)], {"max_new_tokens": max_new_tokens})
        return self.text(ids)


def load_engine(folders: Sequence[str], template: str | None = None) -> Engine:
    """Load a model from its folders (the base, then its adapters), on a GPU if there is one.

    `template` is the text of a chat template that replaces the one of the folder.

    Raises:
        StageError: an adapter does not fit its base, or the tokenizer cannot be used (see `load_tokenizer`).
    """
    model, missing = _load(folders)
    tokenizer = load_tokenizer(folders)
    install_template(tokenizer, template)
    set_stop_tokens(model, tokenizer)
    return Engine(model, tokenizer, missing)


def _load(folders: Sequence[str]) -> tuple[Any, list[str]]:
    """The model, and the names of weights that its folder lacks."""
    if len(folders) > 1:  # adapters are folded in main memory
        model, missing = load_with_missing(folders, dtype="auto")
        return on_gpus(model), missing
    settings = {"device_map": "auto"} if torch_device() == "cuda" else _without_compiling(Path(folders[0]))
    return load_with_missing(folders, dtype="auto", **settings)


def _without_compiling(folder: Path) -> dict[str, Any]:
    """Settings with which GPTQModel uses its plain kernel on a CPU; empty for a model that is not quantized by GPTQ.

    It would compile another kernel for minutes, which gives the same numbers. The plain kernel unpacks the weights for
    every token, unless GPTQ_TORCH_CACHE_WEIGHTS tells it to keep the unpacked weights.
    """
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    if quantization.get("quant_method") != "gptq":
        return {}
    import torch._dynamo.config
    from transformers import GPTQConfig

    os.environ.setdefault("GPTQ_TORCH_CACHE_WEIGHTS", "1")
    torch._dynamo.config.disable = True
    return {"quantization_config": GPTQConfig(bits=quantization["bits"], backend="torch")}
