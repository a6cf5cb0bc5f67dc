"""A chat in the terminal with one model, or with two side by side."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.serve.requests import sampling
from pipeline.views.controls import without_controls
from stages.data.row import Messages
from stages.model import inference
from stages.model.live import Answer, Sampling, generate
from stages.runtime.errors import StageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from stages.model.generation import Engine

COMMANDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "set the system prompt and forget the conversation; without TEXT there is none",
    "/set NAME=VALUE": "change a setting of sampling, such as temperature=0.7",
    "/save FILE": "write the conversation as a row of `format: messages`",
    "/help": "show these commands",
    "/quit": "leave; so does Ctrl-D",
}
HELP = "\n".join(f"{name:17}{text}" for name, text in COMMANDS.items())
NUMBERS: Mapping[str, type[int] | type[float]] = {
    **{"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int, "max_tokens": int}
}


@dataclass
class Chat:
    """A conversation with each model: the questions are the same, and each model sees its own answers."""

    engines: Mapping[str, "Engine"]
    out: "Console"
    sampling: Sampling
    max_tokens: int
    system: str | None = None
    histories: dict[str, Messages] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        start: Messages = [{"role": "system", "content": self.system}] if self.system else []
        self.histories = {name: list(start) for name in self.engines}

    def take(self, line: str) -> bool:
        """Do what a line asks for: answer a question, or follow a command; False to leave."""
        if not line.startswith("/"):
            self._ask(line)
            return True
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        known: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/help": self._help,
        }
        if command in known:
            known[command](rest.strip())
        else:
            self._print(f"there is no command `{command}`{nearest(command, [*known, '/quit'])}")
        return True

    def _print(self, text: str) -> None:
        self.out.print(without_controls(text), markup=False, highlight=False, soft_wrap=True)

    def _help(self, rest: str) -> None:
        self._print(HELP)

    def _reset(self, rest: str) -> None:
        self.reset()
        self._print("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.system = text or None
        self.reset()
        self._print("the system prompt is set" if text else "there is no system prompt now")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        name = name.strip()
        try:
            number = NUMBERS[name](value)
        except KeyError:
            self._print(f"there is no setting `{name}`{nearest(name, NUMBERS)}")
            return
        except ValueError:
            kind = "a whole number" if NUMBERS[name] is int else "a number"
            self._print(f"`{value}` is not {kind}; write it as `/set {name}=…`")
            return
        try:
            if name != "max_tokens":
                self.sampling = sampling({**asdict(self.sampling), name: number})
            elif number < 1:
                raise ValueError("`max_tokens`: an answer has 1 token at least")
            else:
                self.max_tokens = int(number)
        except ValueError as error:
            self._print(str(error))
            return
        self._print(f"{name} is {value.strip()} now")

    def _save(self, name: str) -> None:
        path = Path(name or "chat.jsonl").expanduser()
        rows = [{"messages": messages, "model": model} for model, messages in self.histories.items() if messages]
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            self._print(f"`{path}` cannot be written ({error.strerror})")
            return
        self._print(f"saved to {path}")

    def _ask(self, question: str) -> None:
        """Answer a question with each model; Ctrl-C ends the answer, and what there is of it is kept."""
        live = self._beside() if len(self.engines) > 1 and self.out.is_terminal else self._below()
        try:
            for name, show in live:
                self._answer(name, question, show)
        except StageError as error:
            self._print(str(error))

    def _answer(self, name: str, question: str, show: Callable[[str], None]) -> None:
        engine, history = self.engines[name], self.histories[name]
        asked = [*history, {"role": "user", "content": question}]
        ids = engine.prompt(asked)
        left = inference.positions(engine.model) - len(ids)
        if left < 1:
            raise StageError(f"the conversation has {len(ids):,} tokens, which fill the model; `/reset` starts again")
        answer = Answer(ids, min(self.max_tokens, left), on_text=show)
        try:
            generate(engine, [answer], self.sampling)
        except KeyboardInterrupt:
            answer.cancel()
        if answer.text:  # a question that got no word is as if it had not been asked
            self.histories[name] = [*asked, {"role": "assistant", "content": answer.text}]
        if answer.reason == "length":
            show(f" … (cut at {answer.max_tokens} tokens; `/set max_tokens={2 * answer.max_tokens}` allows more)")

    def _below(self) -> Iterator[tuple[str, Callable[[str], None]]]:
        """The models one after the other; each answer is printed as it is generated."""

        def show(text: str) -> None:
            self.out.print(without_controls(text), end="", markup=False, highlight=False, soft_wrap=True)
            self.out.file.flush()

        for name in self.engines:
            if len(self.engines) > 1:
                self.out.print(f"{name}:", style="bold cyan", markup=False, highlight=False)
            yield name, show
            self.out.print()

    def _beside(self) -> Iterator[tuple[str, Callable[[str], None]]]:
        """The models in columns beside each other."""
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        texts = dict.fromkeys(self.engines, "")

        def table() -> Table:
            shown = Table(*texts, expand=True)
            shown.add_row(*(Text(without_controls(text)) for text in texts.values()))
            return shown

        with Live(table(), console=self.out, refresh_per_second=8) as live:
            for name in self.engines:

                def show(text: str, name: str = name) -> None:
                    texts[name] += text
                    live.update(table())

                yield name, show


def questions() -> Iterator[str]:
    """The lines that the user types, or those of a pipe, until Ctrl-D or the end of the pipe."""
    if not sys.stdin.isatty():
        yield from (line for text in sys.stdin if (line := text.strip()))
        return
    from prompt_toolkit import PromptSession

    session: Any = PromptSession()
    while True:
        try:
            line = session.prompt("> ").strip()
        except KeyboardInterrupt:  # clears the line
            continue
        except EOFError:
            return
        if line:
            yield line
