"""Chat templates: a name or a file in, the template's text out; conversations in, token ids and labels out.

One template and one way to tokenize serve every stage, the exported folder and the server: the ids that a stage
trains on are those of `tokenizer.apply_chat_template(messages)`.
"""

import functools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import StageError, nearest
from stages import _tiktoken

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

BUILT_IN = Path(__file__).parent / "templates"
IGNORED = -100  # the label of a token outside the loss (torch.nn.CrossEntropyLoss)

Message = dict[str, Any]
Tools = list[dict[str, Any]]
Talk = tuple[list[Message], Tools | None]


class Encoded(NamedTuple):
    """A sequence of tokens, and which of them are in the loss."""

    ids: list[int]
    trained: list[tuple[int, int]]
    """The stretches in the loss, in their order and apart: where each begins and ends."""

    @property
    def labels(self) -> list[int]:
        """As long as the ids."""
        labels = [IGNORED] * len(self.ids)
        for begin, end in self.trained:
            labels[begin:end] = self.ids[begin:end]
        return labels


# A conversation with a tool; what a template must have written of it stands beside it.
_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
_TRIED: tuple[list[Message], Tools] = (
    [
        {"role": "user", "content": "A question."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]},
        {"role": "tool", "content": "probe_output"},
        {"role": "assistant", "content": "An answer."},
    ],
    [{"type": "function", "function": _TOOL}],
)
_WRITTEN = {
    "probe_tool": "the tools",
    "probe_call": "tool calls",
    "probe_key": "the arguments of tool calls",
    "probe_value": "the arguments of tool calls",
    "probe_output": "what tools give back",
}


def names() -> list[str]:
    """The built-in templates."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jinja"))


def text(template: str) -> str:
    """The text of a template: a built-in name, a `.jinja` file, or a prompt-template `.json`.

    Raises:
        StageError: there is no such name or file, or it is not a template.
    """
    if template in names():
        return (BUILT_IN / f"{template}.jinja").read_text(encoding="utf-8")
    path = Path(template)
    if path.suffix not in (".jinja", ".json"):
        raise StageError(
            f"there is no template `{template}` (a name, a .jinja or a .json file){nearest(template, names())}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"the template `{template}` cannot be read ({_reason(error)})") from None
    return _from_prompt_json(template, content) if path.suffix == ".json" else _parsed(template, content)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"


def _without_marks(content: str) -> str:
    """The template without `{% generation %}`, a tag of transformers that jinja2 does not know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", content)


def _parsed(name: str, content: str) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_marks(content))
    except TemplateSyntaxError as error:
        raise StageError(f"the template `{name}` is not valid Jinja: line {error.lineno}: {error.message}") from None
    return content


def _from_prompt_json(name: str, content: str) -> str:
    """A chat template from alpaca-lora's prompt template: {prompt_input, prompt_no_input, response_split}.

    Rows reach a chat template with instruction and input joined, so `prompt_no_input` is the one that is used.
    """
    try:
        prompt = json.loads(content)["prompt_no_input"]
        before, after = prompt.split("{instruction}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StageError(
            f"the template `{name}` is no prompt template: it needs `prompt_no_input` with one `{{instruction}}` in it"
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


def trial(template: str, tokenizer: Mapping[str, Any], has_token: Callable[[str], bool]) -> str | None:
    """What is wrong with a template, found without transformers: a conversation is rendered as it would do it."""
    from jinja2 import TemplateError

    special = _special(tokenizer)
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        compiled = _compiled(template)
        full = compiled.render(messages=turns, add_generation_prompt=False, **special)
        prompt = compiled.render(messages=turns[:1], add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template cannot render a question and its answer: {error}"
    if answer not in full or not full.startswith(prompt):
        return "the template's prompt is not how the conversation with its answer begins, so it cannot be trained with"
    after = full.partition(answer)[2].strip()
    mark = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]", after)
    if not after.startswith(special["eos_token"]) and not (mark and has_token(mark[0])):
        shown = f"`{mark[0]}`, which the tokenizer does not know as one token" if mark else f"`{after[:20]}`"
        return f"the template ends the assistant's turn with {shown}; end it with `{{{{ eos_token }}}}`"
    return None


@functools.cache
def _compiled(template: str) -> "Template":
    """The template under the settings that transformers renders with."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, **{"ensure_ascii": False, **more})
    return environment.from_string(_without_marks(template))


def _special(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    return {name: _word(tokenizer.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def trial_of_tools(template: str, tokenizer: Mapping[str, Any]) -> str | None:
    """What is wrong with a template for rows with tools, found without transformers; None for nothing."""
    from jinja2 import TemplateError

    messages, tools = _TRIED
    try:
        written = _compiled(template).render(
            messages=messages, tools=tools, add_generation_prompt=False, **_special(tokenizer)
        )
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template cannot render tool calls ({error}); {_OTHER}"
    return _unwritten(written)


_OTHER = "choose `template: chatml`, `llama3` or `qwen`, or leave rows with tools out"


def _unwritten(written: str) -> str | None:
    """What the template left out of the tried conversation."""
    lost = dict.fromkeys(what for probe, what in _WRITTEN.items() if probe not in written)
    return f"the template does not write {', '.join(lost)}; {_OTHER}" if lost else None


def _word(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")


def tokens(template: str) -> list[str]:
    """The special tokens that a template writes out, such as `<|im_end|>`."""
    return sorted(set(re.findall(r"<\|[a-zA-Z0-9_]+\|>", template)))


def install(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Give a tokenizer its template; without one it keeps its own.

    A tokenizer that starts plain text with BOS (Llama's do) gets a template that does so too: chat templates are
    tokenized without special tokens added, so otherwise the model would see a start that it never saw before.
    """
    if template is None:
        return
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token is not None
    if starts and "bos_token" not in template:
        template = "{{- bos_token -}}\n" + template
    tokenizer.chat_template = template


def encode(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None = None
) -> tuple[list[int], list[int]]:
    """`encode_all` for one conversation: token ids and labels, both of length T."""
    (encoded,) = encode_all(tokenizer, [(messages, tools)])
    return encoded.ids, encoded.labels


def encode_all(tokenizer: "PreTrainedTokenizerBase", talks: Sequence[Talk]) -> list[Encoded]:
    """Token ids of each conversation, and the stretches in the loss, which are the assistant's turns.

    Its tool calls are among them, what the tools gave back is not. The end of turn (the special token after the
    answer) is in the loss, or the model would never learn to stop.

    Raises:
        StageError: the template cannot render these messages or tools, its prompt is not how the conversation
            begins, or it does not end the assistant's turn with a special token.
    """
    if not talks:
        return []
    with_tools = [_has_tools(talk) for talk in talks]
    _refuse_unwritten(tokenizer, any(with_tools))
    special = _marks(tokenizer)
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z\b")
    plain = [talk for talk, has_tools in zip(talks, with_tools, strict=True) if not has_tools]
    slow = functools.partial(_rendered, tokenizer)
    fast = _renderer(tokenizer, plain[0]) if len(plain) > 1 else slow
    renders = [slow if has_tools else fast for has_tools in with_tools]
    full = [render(messages, tools) for render, (messages, tools) in zip(renders, talks, strict=True)]
    ids = token_ids(tokenizer, full)
    marks = [list(pattern.finditer(text)) for text in full]
    turns = list(map(_turns, renders, talks, full, marks))
    ends = list({turn.after: None for found in turns for turn in found or ()})
    known = dict(zip(ends, token_ids(tokenizer, ends), strict=True))
    return [
        (found and _labelled(row, [special[mark[0]] for mark in written], found, known))
        or _by_offsets(tokenizer, talk, text)
        for talk, text, row, written, found in zip(talks, full, ids, marks, turns, strict=True)
    ]


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The token ids of each text; `special`: with what the tokenizer adds around a text.

    As the tokenizer's own call gives them, without the place of every token, which takes half of its time.
    """
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    twins = _tiktoken.ids(backend, texts, special=special)
    if twins is not None:
        return twins
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]


class _Turn(NamedTuple):
    """An assistant's turn without tool calls."""

    marks: int
    """Special tokens before it."""
    after: str
    """Its prompt from the last of these on."""


def _turns(render: Callable[..., str], talk: Talk, text: str, marks: list[re.Match[str]]) -> list[_Turn] | None:
    """The assistant's turns, where they are as plain as most: each ends at the first special token after it."""
    messages, tools = talk
    closed = [mark.end() for mark in marks]
    found: list[_Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], tools, prompt=True)
        before = bisect_right(closed, len(prompt))
        if message.get("tool_calls") or not text.startswith(prompt) or before == len(marks):
            return None
        if text[len(prompt) : marks[before].start()].strip() != message["content"].strip():
            return None
        found.append(_Turn(before, prompt[marks[before - 1].start() if before else 0 :]))
    return found


def _labelled(ids: list[int], marks: list[int], turns: list[_Turn], known: Mapping[str, list[int]]) -> Encoded | None:
    """What is in the loss, found by counting special tokens; None when `marks`, those in the text, are not in `ids`.

    Tokenizers split at their special tokens first and treat what lies between on its own. So a prompt alone is how the
    conversation begins if what follows the prompt's last special token is, and that is the same few words in every row.
    """
    places = [*compress(range(len(ids)), map(frozenset(marks).__contains__, ids))]
    if [ids[place] for place in places] != marks:
        return None
    trained: list[tuple[int, int]] = []
    for before, after in turns:
        first, opening = places[before - 1] if before else 0, known[after]
        begin = first + len(opening)
        if ids[first:begin] != opening:
            return None
        trained.append((begin, places[before] + 1))
    return Encoded(ids, trained)


def _by_offsets(tokenizer: "PreTrainedTokenizerBase", talk: Talk, text: str) -> Encoded:
    """One conversation, the slow way: by the place of every token in the text."""
    messages, tools = talk
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained: list[tuple[int, int]] = []
    special = set(_marks(tokenizer).values())
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _rendered(tokenizer, messages[:index], tools, prompt=True)
            if message.get("tool_calls"):
                upto = _rendered(tokenizer, messages[: index + 1], tools)
                end = _end_of_calls(special, ids, offsets, prompt, upto, text)
            else:
                end = _end(prompt, message["content"].strip(), text)
            _check_boundary(tokenizer, prompt, ids)
            trained.append(_stretch(tokenizer, special, ids, offsets, len(prompt), end))
    return Encoded(ids, trained)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant's next turn begins.

    Raises:
        StageError: the template cannot render these roles, or it would leave out tools or their calls.
    """
    _refuse_unwritten(tokenizer, _has_tools((messages, tools)))
    return _rendered(tokenizer, messages, tools, prompt=prompt)


def _has_tools(talk: Talk) -> bool:
    messages, tools = talk
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def _refuse_unwritten(tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> None:
    """
    Raises:
        StageError: a conversation has tools, and the template would leave them out.
    """
    trouble = _unwritten(_rendered(tokenizer, *_TRIED)) if has_tools else None
    if trouble is not None:
        raise StageError(trouble)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None, *, prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        written: Any = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise StageError(f"the chat template cannot render the roles {roles}: {error}") from None
    return str(written)


def _renderer(tokenizer: "PreTrainedTokenizerBase", tried: Talk) -> Callable[..., str]:
    """`_rendered` at a sixth of its time: the template itself, if it writes the tried conversation just so.

    For conversations without tools.
    """
    from jinja2 import TemplateError

    slow = functools.partial(_rendered, tokenizer)
    if not isinstance(tokenizer.chat_template, str) or "strftime_now" in tokenizer.chat_template:
        return slow
    compiled = _compiled(tokenizer.chat_template)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {**compiled.globals, **special, "tools": None, "documents": None}
    environment, name, blocks = compiled.environment, compiled.name, compiled.blocks

    def fast(messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        # `Template.render` would copy the globals each time, which takes as long as the template itself.
        names = {**given, "messages": messages, "add_generation_prompt": prompt}
        try:
            return "".join(compiled.root_render_func(environment.context_class(environment, names, name, blocks)))
        except TemplateError:
            return slow(messages, tools, prompt=prompt)

    same = all(fast(*tried, prompt=prompt) == slow(*tried, prompt=prompt) for prompt in (False, True))
    return fast if same else slow


_GOES_ON = (
    "the chat template writes the start of a conversation differently once it goes on, so what is trained "
    "would not be what is served; choose a built-in `template:`"
)


def _end(prompt: str, answer: str, full: str) -> int:
    """Where the answer after this prompt ends, its end of turn left out."""
    found = full.find(answer, len(prompt))
    if not full.startswith(prompt) or found < 0:
        raise StageError(_GOES_ON)
    return found + len(answer)


def _end_of_calls(
    special: set[int], ids: list[int], offsets: list[tuple[int, int]], prompt: str, upto: str, full: str
) -> int:
    """Where the tool calls after this prompt end: before the last special token of the turn, whose text is `upto`.

    Qwen3's own template writes an empty thought before the last turn only, so that one may be missing.
    """
    turn = upto[len(prompt) :]
    turn = turn if full.startswith(prompt + turn) else _EMPTY_THOUGHT.sub("", turn)
    if not upto.startswith(prompt) or not full.startswith(prompt + turn):
        raise StageError(_GOES_ON)
    stop = len(prompt + turn)
    starts = [
        first
        for token, (first, last) in zip(ids, offsets, strict=True)
        if token in special and first >= len(prompt) and last <= stop
    ]
    if not starts:
        raise StageError(_NO_END)
    return starts[-1]


_EMPTY_THOUGHT = re.compile(r"\A<think>\s*</think>\s*")


def _check_boundary(tokenizer: "PreTrainedTokenizerBase", prompt: str, ids: list[int]) -> None:
    """The prompt alone, as a server tokenizes it, must be how the trained conversation begins."""
    (alone,) = token_ids(tokenizer, [prompt])
    if ids[: len(alone)] != alone:
        raise StageError(
            "this tokenizer joins the end of the prompt with the start of the answer, so the model would be served "
            "another prompt than it was trained on; choose another `template:`"
        )


def _stretch(
    tokenizer: "PreTrainedTokenizerBase",
    special: set[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    start: int,
    end: int,
) -> tuple[int, int]:
    """The tokens of the characters from `start` to `end`, and on to the special token that ends the turn."""
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    stop = bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])
    for position in range(stop, len(ids)):
        if ids[position] in special:
            return first, position + 1
        if tokenizer.decode([ids[position]]).strip():
            break
    raise StageError(_NO_END)


_NO_END = (
    "the chat template does not end the assistant's turn with a special token, so the model could not learn "
    "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`"
)


def _marks(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The special tokens, and those that were added to the vocabulary, by their text."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return dict(special) | {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the token that ends an assistant's turn in this tokenizer's template.

    Raises:
        StageError: as `encode`.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, labels = encode(tokenizer, probe)
    return next(label for label in reversed(labels) if label != IGNORED)
