"""Chat templates: a built-in name or a file in, the text of the template out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stages.chat.trial import without_clock, without_generation_marks
from stages.runtime.errors import StageError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BUILT_IN = Path(__file__).parent / "templates"


def template_names() -> list[str]:
    """The built-in templates."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jinja"))


def template_text(template: str) -> str:
    """The text of a template: a built-in name, a `.jinja` file, or a prompt-template `.json`.

    Raises:
        StageError: there is no such name or file, or it is not a template.
    """
    if template in template_names():
        return (BUILT_IN / f"{template}.jinja").read_text(encoding="utf-8")
    path = Path(template)
    if path.suffix not in (".jinja", ".json"):
        raise StageError(
            f"there is no template `{template}` (a name, a .jinja or a .json file){nearest(template, template_names())}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"the template `{template}` cannot be read ({_reason(error)})") from None
    return _from_prompt_json(template, content) if path.suffix == ".json" else _parsed(template, content)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"


def _parsed(name: str, content: str) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(without_generation_marks(content))
    except TemplateSyntaxError as error:
        raise StageError(f"the template `{name}` is not valid Jinja: line {error.lineno}: {error.message}") from None
    return content


def _from_prompt_json(name: str, content: str) -> str:
    """A chat template from alpaca-lora's prompt template: {prompt_input, prompt_no_input, response_split}.

    Only `prompt_no_input` is used: the instruction and the input of a row are joined before they reach a template.
    """
    try:
        prompt = json.loads(content)["prompt_no_input"]
        before, after = prompt.split("{instruction}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StageError(
            f"the template `{name}` is not a prompt template: it needs `prompt_no_input` with one `{{instruction}}` "
            "in it"
        ) from None
    before, after = json.dumps(before, ensure_ascii=False), json.dumps(after, ensure_ascii=False)
    return (
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'system' -%}\n{{- message['content'] + '\\n' -}}\n"
        "{%- elif message['role'] == 'user' -%}\n"
        f"{{{{- {before} + message['content'] + {after} -}}}}\n"
        "{%- else -%}\n{{- message['content'] + eos_token -}}\n"
        "{%- if not loop.last -%}\n{{- '\\n' -}}\n{%- endif -%}\n"
        "{%- endif -%}\n{%- endfor -%}\n"
    )


def install_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Give a tokenizer a chat template; with None it keeps its own. A date that it would write is fixed (`DAY`).

    A tokenizer that starts every text with BOS (as Llama's do) gets a template that writes BOS too: tokenizers add no
    special tokens to a conversation, so without it the model would see a start that it has never seen.
    """
    if template is None:
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = without_clock(tokenizer.chat_template)
        return
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token is not None
    if starts and "bos_token" not in template:
        template = "{{- bos_token -}}\n" + template
    tokenizer.chat_template = without_clock(template)
