"""Config files, shell scripts and command lines of other programs in, one job for each command out.

A shell script is read, never run: line continuations, comments, `export`, variables with a plain value, redirections,
`&&` and `;` are understood. Lines that start none of the programs are skipped; control flow is reported.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.document import parse, read
from pipeline.config.foreign import program_of
from pipeline.errors import ConfigError
from pipeline.tools.convert_parts import Book, Given, Job

CONFIGS = (".yaml", ".yml", ".json")
SCRIPTS = (".sh", ".bash", ".txt", ".bat", ".command")
# The last part of a program's name or script → the program and what it does.
STARTERS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("train.py", "train_bash.py"), ("llamafactory", "train")),
    **dict.fromkeys(("llamafactory-cli", "lmf", "llamafactory.cli", "launcher.py"), ("llamafactory", "")),
    "export_model.py": ("llamafactory", "export"),
    "evaluate.py": ("llamafactory", "eval"),
    **dict.fromkeys(("api.py", "api_demo.py", "cli_demo.py", "web_demo.py", "webui.py"), ("llamafactory", "chat")),
    "axolotl": ("axolotl", ""),
    "axolotl.cli.train": ("axolotl", "train"),
    "axolotl.cli.preprocess": ("axolotl", "preprocess"),
    "axolotl.cli.merge_lora": ("axolotl", "merge-lora"),
    "axolotl.cli.inference": ("axolotl", "inference"),
    "trl": ("trl", ""),
    **{f"{name}.py": ("trl", name) for name in ("sft", "dpo", "kto", "reward", "ppo", "grpo", "orpo")},
    **{f"run_{name}.py": ("trl", name) for name in ("sft", "dpo", "kto", "orpo", "cpt", "ppo")},
    "pretraining.py": ("medicalgpt", "pt"),
    "supervised_finetuning.py": ("medicalgpt", "sft"),
    "dpo_training.py": ("medicalgpt", "dpo"),
    "reward_modeling.py": ("medicalgpt", "reward"),
    "merge_peft_adapter.py": ("medicalgpt", "merge"),
    **{f"{name}_training.py": ("medicalgpt", name) for name in ("ppo", "orpo", "grpo", "opd")},
    **{f"{name}.py": ("medicalgpt", name) for name in ("model_quant", "eval_quantize")},
}
VERBS = {
    "llamafactory": (
        "train",
        "export",
        "eval",
        "chat",
        "api",
        "webchat",
        "webui",
        "env",
        "version",
        "help",
        "sft",
        "dpo",
    ),
    "axolotl": ("train", "preprocess", "merge-lora", "inference", "evaluate", "quantize", "fetch", "vllm-serve"),
    "trl": ("sft", "dpo", "kto", "reward", "ppo", "grpo", "orpo", "rloo", "env", "vllm-serve", "chat"),
    "medicalgpt": (),
}
SILENT = (
    *(
        "cd",
        "echo",
        "mkdir",
        "set",
        "source",
        ".",
        "pip",
        "pip3",
        "conda",
        "git",
        "wget",
        "curl",
        "ls",
        "rm",
        "cp",
        "mv",
    ),
    *("sleep", "wait", "export", "unset", "ulimit", "module", "nvidia-smi", "true", "exit", "huggingface-cli", "hf"),
)
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "nohup", "time", "srun", "env", "sudo", "uv", "poetry", "exec")
CONTROL = ("if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case", "esac", "function")
COUNTS = ("--nproc_per_node", "--nproc-per-node", "--num_processes", "--num_gpus")
NODES = ("--nnodes", "--num_machines", "--num_nodes")


def jobs(sources: Sequence[str], book: Book) -> list[Job]:
    """The commands that the sources hold, in their order.

    A source is a config file, a shell script, or a command line; several words that are no files are one command line.

    Raises:
        ConfigError: a source cannot be read, or holds no command of a known program.
    """
    words = list(sources)
    if words and not is_source(words[0]):
        words = [shlex.join(words)]
    found = [job for word in words for job in _jobs_of(word, book)]
    if not found:
        named = ", ".join(word if " " not in word else "the command line" for word in words) or "nothing"
        known = "LLaMA-Factory, Axolotl, TRL, alignment-handbook and MedicalGPT"
        raise ConfigError([f"{named}: there is no training command here; {known} are known"])
    return found


def is_source(word: str) -> bool:
    """Whether a word is a source of its own: a file, or a whole command line."""
    return " " in word or "\n" in word or Path(word).suffix.lower() in (*CONFIGS, *SCRIPTS) or Path(word).is_file()


def _jobs_of(word: str, book: Book) -> list[Job]:
    path = Path(word)
    if " " in word and not path.is_file():
        return Script("command line", word, Path(), book).jobs()
    if path.suffix.lower() in CONFIGS:
        given = config_file(path)
        return [Job(recognised(given, path), "", str(path), given, folder=path.parent)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            [f"{path}: cannot be read ({reason}); name a YAML file, a shell script or a command"]
        ) from None
    return Script(str(path), text, path.parent, book).jobs()


def config_file(path: Path) -> dict[str, Given]:
    """The arguments in a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    document = read(path)
    if document.problems:
        raise ConfigError(document.problems)
    return {name: Given(value, document.key_place((name,)).rsplit(":", 1)[0]) for name, value in document.data.items()}


def recognised(given: Mapping[str, Any], path: Path) -> str:
    """The program that a config file is for, by its keys.

    Raises:
        ConfigError: it is for none of them.
    """
    if (program := program_of(given)) is not None:
        return program
    if "stages" in given:
        raise ConfigError([f"{path}: is a config of this program already; `pipeline plan {path}` reads it"])
    if "distributed_type" in given:
        raise ConfigError([f"{path}: is a config of accelerate; name the file that its train command gets"])
    text = "the keys are those of no known program (LLaMA-Factory, Axolotl, TRL, alignment-handbook)"
    raise ConfigError([f"{path}: {text}; name the file that its train command gets"])


@dataclass
class Script:
    """A shell script or a command line."""

    name: str
    text: str
    folder: Path
    book: Book

    def jobs(self) -> list[Job]:
        """Its commands, in their order."""
        variables: dict[str, str] = {}
        exported: dict[str, str] = {}
        found: list[Job] = []
        for number, line in self._lines():
            place = f"{self.name}:{number}" if "\n" in self.text.strip() else self.name
            for piece in _pieces(line):
                words, environment = self._words(_filled(piece, variables), place), dict(exported)
                while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], re.S)):
                    environment[match[1]] = match[2]
                    words = words[1:]
                if not words:
                    variables |= {key: value for key, value in environment.items() if exported.get(key) != value}
                elif words[0] == "export":
                    pairs = [word.partition("=") for word in words[1:] if "=" in word]
                    exported |= {name: value for name, _, value in pairs}
                    variables |= exported
                else:
                    job = self._job(words, environment, place)
                    found += [job] if job is not None else []
        return found

    def _lines(self) -> list[tuple[int, str]]:
        """Logical lines with the number of their first line."""
        joined: list[tuple[int, str]] = []
        pending, start = "", 0
        for number, line in enumerate(self.text.splitlines(), 1):
            start = start if pending else number
            stripped = line.rstrip()
            if re.search(r"(?<!\\)[\\^]$", stripped) and not stripped.lstrip().startswith("#"):
                pending += stripped[:-1] + " "
                continue
            if pending and stripped.lstrip().startswith("#"):  # a comment between continued lines
                continue
            joined.append((start, pending + stripped))
            pending = ""
        return [*joined, (start, pending)] if pending.strip() else joined

    def _words(self, piece: str, place: str) -> list[str]:
        """The words of one command, without redirections.

        Raises:
            ConfigError: a quotation mark is not closed.
        """
        lexer = shlex.shlex(piece, posix=True, punctuation_chars="&<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            every = list(lexer)
        except ValueError as error:
            raise ConfigError([f"{place}: the command cannot be read ({error}); close the quotation marks"]) from None
        words: list[str] = []
        skip = False
        for word in every:
            if skip:
                skip = False
            elif re.fullmatch("[<>&]+", word):
                if words and words[-1] in ("1", "2"):
                    words.pop()
                skip = word != "&"
            else:
                words.append(word)
        return words

    def _job(self, words: list[str], environment: Mapping[str, str], place: str) -> Job | None:
        """The job of one command; None if it starts none of the programs."""
        if words[0] in CONTROL:
            text = f"`{words[0]}`: control flow of the shell is not followed; commands in it are read once"
            self.book.note("differs", place, text)
            words = words[1:] if words[0] in ("do", "then", "else") else []
        if not words:
            return None
        first = Path(words[0]).name
        launched = first in LAUNCHERS or first.startswith("python")
        start = next((index for index, word in enumerate(words) if Path(word).name in STARTERS), None)
        if start is None or (start and not launched):
            if first not in SILENT:
                self.book.note("not needed", place, f"`{words[0]} …`: it starts no training")
            return None
        program, verb = STARTERS[Path(words[start]).name]
        rest = words[start + 1 :]
        if not verb and rest and rest[0] in VERBS[program]:
            verb, rest = rest[0], rest[1:]
        given = self._given(rest, place)
        if (Path(words[start]).name == "train.py" or program == "trl") and "base_model" in given:
            program = "axolotl"
        count = _processes(words[:start], environment, launched=program == "llamafactory")
        if (file := _value_of(words[:start], ("--config_file",))) is not None:
            text = (
                f"`--config_file {file}`: accelerate's file is not read; write `launch: {{processes: N, strategy: …}}`"
            )
            self.book.note("not supported", place, text)
        if (nodes := _value_of(words[:start], NODES) or environment.get("NNODES", "1")) not in ("1", "1:1"):
            self.book.note("not supported", place, f"{nodes} machines: a run uses one machine")
        folder = next((Path(word).parent for word in rest if Path(word).suffix in CONFIGS), self.folder)
        return Job(program, verb, place, given, environment, count, folder)

    def _given(self, words: Sequence[str], place: str) -> dict[str, Given]:
        """Arguments: a config file, `--name value`, `--name=value`, `--flag`, and `name=value`."""
        given: dict[str, Given] = {}
        queue = list(words)
        while queue:
            word = queue.pop(0)
            if word.startswith("--"):
                name, equals, text = word[2:].partition("=")
                values = [text] if equals else []
                while queue and not equals and not queue[0].startswith("--"):
                    values.append(queue.pop(0))
                name = name.replace("-", "_")
                if name == "config" and values:
                    given |= config_file(self._found(values[0]))
                else:
                    given[name] = Given(_value(values), place)
            elif Path(word).suffix.lower() in CONFIGS:
                given |= config_file(self._found(word))
            elif "=" in word:
                name, _, text = word.partition("=")
                given[name.lstrip("+")] = Given(_value([text]), place)
        return given

    def _found(self, word: str) -> Path:
        """A config file, from the working folder, or from the script's folder or one above it."""
        places = [Path(), self.folder, *self.folder.resolve().parents]
        return next((folder / word for folder in places if (folder / word).is_file()), Path(word))


def _pieces(line: str) -> list[str]:
    """The commands of a line: what is between `;`, `&&`, `||`, `|` and `&` outside quotation marks."""
    pattern = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?<!\S)#.*$|[<>]&|&>|;|\|+|&+|[^;|&<>'"\\#]+|."""
    pieces = [""]
    for part in re.findall(pattern, line, re.S):
        if part.startswith("#") and not pieces[-1][-1:].strip():
            break
        if re.fullmatch(r";|\|+|&+", part):
            pieces.append("")
        else:
            pieces[-1] += part
    return [piece for piece in pieces if piece.strip()]


def _filled(piece: str, variables: Mapping[str, str]) -> str:
    """The text of a command with `$NAME`, `${NAME}` and `${NAME:-default}` filled in where the value is known.

    What is in single quotation marks stays. A value outside quotation marks may become several words.
    """

    def value(match: re.Match[str]) -> str:
        if match[0].startswith("'"):
            return match[0]
        return variables.get(match[1] or match[3], match[2] if match[2] is not None else match[0])

    return re.sub(r"'[^']*'|\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)", value, piece)


def _value(words: Sequence[str]) -> Any:
    """The value of an argument on a command line: no word is true, several words are a list."""
    if not words:
        return True
    values = [_scalar(word) for word in words]
    return values[0] if len(values) == 1 else values


def _scalar(word: str) -> Any:
    """A word as YAML reads it; a text that is no YAML stays text."""
    if word in ("True", "False"):
        return word == "True"
    if word == "None":
        return None
    found = parse(word, "", wants_mapping=False)
    return word if found.problems or (isinstance(found.data, dict) and word[:1] not in "{[") else found.data


def _value_of(words: Sequence[str], names: Sequence[str]) -> str | None:
    for index, word in enumerate(words):
        name, _, text = word.partition("=")
        if name in names:
            return text or next(iter(words[index + 1 :]), None)
    return None


def _processes(words: Sequence[str], environment: Mapping[str, str], *, launched: bool) -> int | None:
    """Processes on one machine: of the launcher, or one a visible GPU where the program starts them by itself."""
    if (count := _value_of(words, COUNTS) or environment.get("NPROC_PER_NODE")) and count.isdigit():
        return int(count)
    devices = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    starts_itself = launched and "torchrun" not in words
    return len(devices) if devices and starts_itself else None
