"""A tokenizer and the faster functions that give the same: conversations in, text and token ids out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from stages.chat import fast_tokens
from stages.chat.rendering import fast_renderer, rendered
from stages.chat.shapes import Shape
from stages.chat.writing import Render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that has its chat template, and faster functions that give the same texts and token ids.

    When the tokenizer gets another template, make a new encoder: the fast renderer is built for one template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    twin: fast_tokens.Twin | None = None
    """Gives the tokenizer's token ids faster; None if there is none, or if `with_twin` was not called."""
    tried: dict[Shape, str | None] = field(default_factory=dict)
    """Shape of conversations → why the template cannot be used for them, or None; of the shapes so far."""

    def with_twin(self) -> "Encoder":
        """An encoder with the tokenizer's twin, if there is one; the search encodes every token of the vocabulary."""
        return replace(self, twin=fast_tokens.find_twin(self._backend))

    def token_ids(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The token ids of each text, neither cut nor padded; `special`: with the tokens that start and end a text.

        They are those of the tokenizer's own call, which also finds the place of every token and takes twice as long.
        """
        self._backend.no_truncation()
        self._backend.no_padding()
        return fast_tokens.token_ids(self._backend, texts, self.twin, special=special)

    @cached_property
    def render(self) -> Render:
        """Writes a conversation with the chat template, as transformers does it."""
        return partial(rendered, self.tokenizer)

    @cached_property
    def render_fast(self) -> Render:
        """As `render` for conversations without tools, in a quarter of its time if it wrote all probes the same."""
        return fast_renderer(self.tokenizer)

    @property
    def _backend(self) -> Any:
        """The tokenizer of the library `tokenizers` inside the one of transformers."""
        return self.tokenizer.backend_tokenizer
