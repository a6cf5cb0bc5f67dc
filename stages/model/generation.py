"""The engine: a model ready to answer as it is served, for evaluation, for questions after a run, and for servers.

What was trained is what is served: the weights in the dtype that they are stored in, adapters folded in, the tokenizer
with its chat template, and generation that stops where training taught the model to stop.
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
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
TOKENS = 4096  # in memory at once when nothing else is asked for


@dataclass(frozen=True)
class Engine:
    """A model, its tokenizer with the chat template, and the names of weights that its folder lacks."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    missing: Sequence[str] = ()
    """transformers makes up such weights at random; a model with missing weights is good for nothing."""

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer as rows are encoded with it."""
        return Encoder(self.tokenizer)

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> Ids:
        """The token ids of a conversation up to where the answer begins; without a chat template, of its last message.

        Raises:
            StageError: the chat template cannot render these roles, or it would leave out tools.
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
        """What the model goes on with after each prompt, up to its stop token, which is kept."""
        return inference.answers(self.model, self.tokenizer, prompts, tokens, report, settings=settings)

    def stopped(self, ids: Ids) -> bool:
        """Whether an answer ended by itself, with a stop token."""
        return bool(ids) and ids[-1] in inference.stop_tokens(self.model)

    def text(self, ids: Ids) -> str:
        """The words of an answer, without special tokens and blanks around them."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        """The likeliest answer (greedy) to one conversation."""
        (ids,) = self.generate([self.prompt(messages)], {"max_new_tokens": max_new_tokens})
        return self.text(ids)


def load_engine(folders: Sequence[str], template: str | None = None) -> Engine:
    """Load a model from its folders (the base, then its adapters), on a GPU if there is one.

    `template` takes the place of the chat template of the folder.
    """
    model, missing = _load(folders)
    tokenizer = load_tokenizer(folders)
    install_template(tokenizer, template)
    set_stop_tokens(model, tokenizer)
    return Engine(model, tokenizer, missing)


def _load(folders: Sequence[str]) -> tuple[Any, list[str]]:
    """The model, and the names of weights that its folder lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    if len(folders) > 1:
        chain: Any = load_model(folders, dtype="auto")
        return chain.to("cuda" if on_gpu else "cpu"), []
    settings = {"device_map": "auto"} if on_gpu else _without_compiling(Path(folders[0]))
    model, info = AutoModelForCausalLM.from_pretrained(
        folders[0], local_files_only=True, trust_remote_code=False, output_loading_info=True, **settings
    )
    model.eval()
    return model, sorted(info["missing_keys"])


def _without_compiling(folder: Path) -> dict[str, Any]:
    """On a CPU, GPTQModel would compile a kernel for minutes; its plain kernel gives the same numbers.

    The plain kernel unpacks the weights for every token, unless it is told to keep what it has unpacked.
    """
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    if quantization.get("quant_method") != "gptq":
        return {}
    import torch._dynamo.config
    from transformers import GPTQConfig

    os.environ.setdefault("GPTQ_TORCH_CACHE_WEIGHTS", "1")
    torch._dynamo.config.disable = True
    return {"quantization_config": GPTQConfig(bits=quantization["bits"], backend="torch")}
