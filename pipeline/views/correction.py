"""A command line with mistakes in, the correct command line out: what is wrong with it, and what to write instead."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLE = "configs/tiny.yaml"
SYNONYMS = {
    **dict.fromkeys(("train", "finetune", "start", "resume"), "run"),
    **{"check": "validate", "list": "status", "show": "report", "compare": "diff", "clean": "gc"},
    **{"help": "--help", "version": "--version"},
}
"""What other tools call a command → the command or option here."""
CONFIG_OPTIONS = ("-c", "-f", "--cfg", "--config", "--config-file", "--config-path", "--file", "--yaml")
"""Options that take the config in other tools; here the config is an argument."""
OUTPUT_OPTIONS = ("output_dir", "output", "out_dir", "save_dir", "o")
"""Options that take the output folder in other tools; here it is `--saves`."""
TOP_LEVEL = ("model", "template", "seed", "question")
"""Settings at the top of a config that take a single value."""


class Correction:
    """Reads a wrong command line once, collects every reason why it is wrong, and builds the correct line."""

    def __init__(self, commands: Mapping[str, Any]) -> None:
        """`commands`: Click's commands by name; the `params` of a command are its arguments and options."""
        self.commands = commands
        self.reasons: list[str] = []
        self.settings: dict[str, list[str]] = {}
        """Settings that were written as options, by the stages that they belong to."""
        self.certain = True
        """Whether the correct line is known; if not, only the reasons are shown."""

    def sentence(self, words: Sequence[str], fallback: str) -> str:
        """What is wrong and what to write; `fallback` if this class finds nothing wrong."""
        command, *rest = self.correct_command(list(words))
        line = shlex.join(["pipeline", command, *(self.arguments(command, rest) if command in self.commands else rest)])
        for owner, names in self.settings.items():
            subject = f"{names[0]} is a setting" if len(names) == 1 else f"{', '.join(names)} are settings"
            self.reasons.append(f"{subject} of {owner} and need{'s' if len(names) == 1 else ''} `--set`")
        if not self.reasons:
            return fallback
        return "; ".join(self.reasons) + (f": write `{line}`" if self.certain else "")

    def correct_command(self, words: list[str]) -> list[str]:
        """The words with the correct command first."""
        place = next((place for place, word in enumerate(words) if not word.startswith("-")), None)
        if place is None:
            self.certain = False
            missing = f"a command is missing, such as `run` in `pipeline run {EXAMPLE}`"
            self.reasons.append(f"`pipeline` has no option `{words[0]}`" if words else missing)
            self.reasons.append("`pipeline --help` shows them all")
            return words or [""]
        before, word, rest = words[:place], words[place], words[place + 1 :]
        if word in self.commands:
            self.reasons += [f"`{before[0]}` goes after the command"] if before else []
            return [word, *rest, *before]
        return self.intended_command(word, [*rest, *before])

    def intended_command(self, word: str, rest: list[str]) -> list[str]:
        """The words with the command that was probably meant instead of `word`, which is not a command."""
        from stages import kinds
        from stages.runtime.errors import nearest

        if _is_yaml(word):
            self.reasons.append(f"`{word}` is a config, not a command")
            return ["run", word, *rest]
        stages = stage_kinds(next(filter(_is_yaml, (part.rpartition("=")[2] for part in rest)), None))
        known = [*self.commands, *SYNONYMS, *kinds(), *stages]
        close = re.search("did you mean `(.+)`", nearest(word, known))
        right = word if word in known else close[1] if close else ""
        if right in stages or right in kinds():
            name = right if right in stages else next((name for name, kind in stages.items() if kind == right), right)
            is_name = word == name
            clause = f"`{word}` is" if is_name else f"`{word}` is not a command, but `{name}` is"
            self.reasons.append(f"{clause} a stage" + (", not a command" if is_name else ""))
            return ["run", *rest, "--until", name]
        self.reasons.append(
            f"`{word}` is not a command"
            + ("" if right else nearest(word, self.commands) or "; `pipeline --help` shows them all")
        )
        self.certain = bool(right)
        return [SYNONYMS.get(right, right or word), *(rest if SYNONYMS.get(right, "")[:1] != "-" else [])]

    def arguments(self, command: str, words: list[str]) -> list[str]:
        """The correct words after a command: its arguments, then its options."""
        params = self.commands[command].params
        options = {name: param for param in params for name in param.opts if name.startswith("-")}
        wanted = [param for param in params if param.param_type_name == "argument"]
        takes_config = any(param.name == "config" for param in wanted)
        plain, right, unknown = self.split(words, options)
        for name, value in unknown if takes_config else []:
            if _is_config_option(name):
                self.reasons.append("the config is an argument")
                plain[:0] = [value] if value else []
        config = next((word for word in plain if not is_assignment(word)), None)
        for word in [word for word in plain if is_assignment(word) and "--set" in options]:
            plain.remove(word)
            right += self.assignment(word, config)
        for name, value in unknown:
            if not (takes_config and _is_config_option(name)):
                right += self.option(command, name, value, options, config)
        for word in plain[len(wanted) :]:
            is_stage = "--until" in options and word in stage_kinds(config)
            self.reasons.append(f"`{word}` is a stage" if is_stage else f"`{word}` is one argument too many")
            right += ["--until", word] if is_stage else []
        for param in [param for param in wanted[len(plain) :] if param.required]:
            self.reasons.append(f"{param.metavar} is missing")
            plain.append(EXAMPLE if param.name == "config" else param.metavar)
        return [*plain[: len(wanted)], *right]

    def split(
        self, words: list[str], options: Mapping[str, Any]
    ) -> tuple[list[str], list[str], list[tuple[str, str | None]]]:
        """Splits words into arguments, known options with their values, and unknown options with their values."""
        plain: list[str] = []
        known: list[str] = []
        unknown: list[tuple[str, str | None]] = []
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                return [*plain, *words], known, unknown
            if not word.startswith("-"):
                plain.append(word)
            elif name in options and options[name].is_flag:
                self.reasons += [f"`{name}` takes no value"] if equals else []
                known.append(name)
            elif name in options and equals:
                known.append(word)
            elif name == "--set" and len(words) > 1 and _is_pair(*words[:2]):
                known += [name, f"{words[0]}={words[1]}"]
                self.reasons.append(f"`--set {words.pop(0)}` needs `=` before `{words.pop(0)}`")
            elif name in options and words and not words[0].startswith("--"):
                known += [word, words.pop(0)]
            elif name in options:
                self.reasons.append(f"`{name}` needs a value")
                known += [name, options[name].metavar]
            elif equals or not words or not _is_value(words[0], name):
                unknown.append((name, value if equals else None))
            else:
                unknown.append((name, words.pop(0)))
        return plain, known, unknown

    def assignment(self, word: str, config: str | None) -> list[str]:
        """The option for `a.b=1`, which is how Hydra writes a setting; parts of its path may be missing."""
        name, _, value = word.partition("=")
        *owners, last = name.removeprefix("stages.").split(".")
        paths = [path for path in _paths(last, config) if {*owners} <= {*path.split(".")[:-1]}]
        if not owners and paths:
            return self.setting(name, value, paths)
        self.reasons.append(f"`{word}` needs `--set`")
        return ["--set", f"{paths[0]}={value}" if paths else word]

    def setting(self, name: str, value: str, paths: Sequence[str]) -> list[str]:
        """The option for a setting written without its stage; the first stage in `paths` gets the value."""
        stages = [f"`{path.partition('.')[0]}`" for path in paths if "." in path]
        owner = f"stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}" if stages else "the config"
        self.settings.setdefault(owner, []).append(f"`{name}`")
        return ["--set", f"{paths[0]}={value}"]

    def option(
        self, command: str, name: str, value: str | None, options: Mapping[str, Any], config: str | None
    ) -> list[str]:
        """The correct words for an unknown option: a setting, a typo, or the name that another tool uses."""
        from stages.runtime.errors import nearest

        word = name.lstrip("-").replace("-", "_")
        if "." in name and "--set" in options:
            return self.assignment(f"{name.lstrip('-')}={value or 'true'}", config)
        if word in OUTPUT_OPTIONS and "--saves" in options:
            self.reasons.append("outputs go to `--saves`")
            return ["--saves", value or "DIR"]
        if "--set" in options and (paths := _paths(word, config)):
            return self.setting(name, value or "true", paths)
        self.certain = False
        near = nearest(word.replace("_", "-"), [option.lstrip("-") for option in options])
        hint = re.sub("`(.+?)`", r"`--\1`", near)
        if "--set" in options and "did you mean" not in near:
            hint = _setting_hint(word) or hint
        self.reasons.append(f"`pipeline {command}` has no option `{name}`{hint}")
        return []


def is_assignment(word: str) -> bool:
    """Whether a word looks like `sft.trainer.max_steps=3` and is not the name of a file."""
    return bool(re.match(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", word)) and not _is_yaml(word) and not os.path.exists(word)


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _is_config_option(name: str) -> bool:
    return name.replace("_", "-") in CONFIG_OPTIONS


def _is_value(word: str, option: str) -> bool:
    """Whether the word after an unknown option is its value. A config after `--bf16` is not."""
    return not re.match("--?[A-Za-z]", word) and (_is_config_option(option) or not _is_yaml(word))


def stage_kinds(config: str | Path | None) -> dict[str, str]:
    """Name of each stage in a config → its kind; empty if the file cannot be read."""
    from pipeline.config.document import read
    from pipeline.errors import ConfigError

    try:
        root: Any = read(Path(config)).data if config is not None else None
    except ConfigError:
        return {}
    written = root.get("stages") if isinstance(root, dict) else None
    stages = written.items() if isinstance(written, dict) else ()
    return {str(name): str(raw.get("use", name)) if isinstance(raw, dict) else str(name) for name, raw in stages}


def _paths(name: str, config: str | None) -> list[str]:
    """Paths of a setting in a config: `sft.trainer.max_steps` for each stage that has the setting, or `seed`."""
    from pipeline.config.library_names import MANAGED, MOVED
    from pipeline.config.settings import settings
    from stages import find, kinds

    if name in TOP_LEVEL:
        return [name]
    found = []
    for stage, kind in (stage_kinds(config) or {"sft": "sft"}).items():
        contract = find(kind) if kind in kinds() else None
        for key, reference in contract.settings.items() if contract else ():
            owner = reference.partition(":")[2]
            now = re.fullmatch(r"`(\w+)`", MOVED.get(owner, {}).get(name, ""))
            word = now[1] if now else name
            if word in settings(reference) and word not in MANAGED.get(owner, {}):
                found.append(".".join(filter(None, (stage, key, word))))
                break
        else:
            found += [f"{stage}.{name}"] if contract and name in contract.config.model_fields else []
    return found


def _is_pair(name: str, value: str) -> bool:
    """Whether two words are a setting and its value, without the `=` between them."""
    return (
        "." in name and "=" not in name + value and not value.startswith("-") and not value.endswith((".yaml", ".yml"))
    )


def _setting_hint(name: str) -> str | None:
    """The config's hint for a setting with this name; None if it only says that there is no such setting."""
    from pipeline.config.settings import problem
    from stages import find

    clause = problem(find("sft").settings["trainer"], name, None)
    return None if clause is None or clause.endswith(f"has no setting `{name}`") else f", and {clause}"
