"""What the command line shows: tables, coloured text, JSON, errors, and the right form of a line it cannot read."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import TyperException

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.plan.step import Plan
    from pipeline.views.progress import View
    from pipeline.views.samples import Seen


# Tables, coloured text and JSON


def console(*, silent: bool = False) -> "Console":
    """The standard output, 160 columns wide where it is not a terminal; with `silent`, nothing is shown."""
    from rich.console import Console

    if silent:
        return Console(file=StringIO(), width=160)
    return Console(width=None if sys.stdout.isatty() else 160)


def print_plain(out: "Console", text: str) -> None:
    """Print text as it is: rich adds no markup, no colour and no line break."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows below the names of their values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    console().print(table)


def print_data(out: "Console", seen: "Seen") -> None:
    """Print one data set as one stage reads it; trained text is green, or between ⟦ and ⟧ where there is no colour."""
    from rich.text import Text

    out.print(Text(f"{seen.data}, as `{seen.stage}` reads it", style="bold"))
    for line in _account(seen):
        out.print(Text(f"  {line}"), soft_wrap=True)
    for number, sample in enumerate(seen.samples, 1):
        text = Text(f"  sequence {number}\n", style="dim")
        for words, in_loss in sample:
            marked = words if out.is_terminal else f"⟦{words}⟧"
            text.append(marked if in_loss else words, style="not dim green" if in_loss else "not dim")
        out.print(text, soft_wrap=True)
    out.print()


def _account(seen: "Seen") -> Iterator[str]:
    """How many rows and tokens a stage reads, drops and trains on."""
    account, tokens = seen.account, seen.tokens
    yield f"{account.read:,} rows read, {account.kept:,} kept, {account.changed:,} of them changed by cleaning"
    for reason, lost in account.dropped.items():
        yield f"{lost.rows:,} dropped, {reason}: {'; '.join(lost.first)}"
    for kind, count in account.personal_data.items():
        yield f"{count:,} {kind} found"
    if tokens is None:
        yield "no tokens yet: the model that the stage starts from has not been made"
        return
    share = tokens.trained / max(1, tokens.tokens)
    yield f"{tokens.tokens:,} tokens in {tokens.sequences:,} sequences, {share:.1%} of them in the loss"
    yield (
        f"longest {tokens.longest:,} tokens, {tokens.truncated:,} cut off at max_length, "
        f"{tokens.untrained:,} dropped because nothing to train is left, {tokens.padding:.1%} padding if not packed"
    )


def print_run(
    out: "Console", planned: "Plan", view: "View", records: Sequence[Mapping[str, Any]], answers: Mapping[str, str]
) -> None:
    """Print what a finished run did, what its evaluations measured, and each model's answer to the question."""
    from pipeline.views.progress import result_table

    out.print()
    out.print(result_table(planned, records, {name: row.state for name, row in view.rows.items()}))
    print_evaluations(out, planned)
    if answers:
        out.print(f"\nThe same question to each model: {planned.pipeline.question}", markup=False, highlight=False)
    for name, text in answers.items():
        print_plain(out, f"  {name}: {text.strip() or '(nothing)'}")


def print_evaluations(out: "Console", planned: "Plan") -> None:
    """Print the table of each evaluation that is finished."""
    from pipeline.views.progress import evaluation_table

    for step in planned.reports:
        if step.folder.is_dir():
            out.print(f"\n{step.name}, all of it in {step.link}", markup=False, highlight=False)
            out.print(evaluation_table(step.folder))


def plan_as_json(planned: "Plan") -> dict[str, Any]:
    """What `plan --json` writes."""
    steps = [
        {
            "stage": step.name,
            "use": step.use,
            "state": step.state,
            "why": step.why,
            "folder": str(step.folder),
            "fingerprint": step.fingerprint,
            "recipe": step.recipe,
            "inputs": step.identities,
        }
        for step in planned.steps
    ]
    return {"steps": steps, "rows": planned.rows, "notes": planned.notes}


def run_as_json(planned: "Plan", records: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> dict[str, Any]:
    """What `run --json` writes."""
    steps = [
        {"stage": step.name, "folder": str(step.folder), "metrics": record["metrics"], "seconds": record["seconds"]}
        for step, record in zip(planned.steps, records, strict=True)
    ]
    return {"steps": steps, "answers": answers}


# Errors, and the right line for a command line that cannot be read


def error_message(error: Exception, verbs: Mapping[str, Any], words: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code and the lines for an error that the user can fix; no lines for a fault of ours."""
    from pipeline.errors import ConfigError
    from stages.runtime.errors import PipelineError, explain

    if isinstance(error, TyperException):
        return 2, [f"error: {Correction(verbs).sentence(words, error.format_message())}"]
    if isinstance(error, ConfigError):
        count = len(error.problems)
        return 2, [*error.problems, *([f"{count} problems; nothing was run"] if count > 1 else [])]
    if isinstance(error, PipelineError):
        return error.exit_code, [f"error: {error}"]
    text = explain(error) if isinstance(error, OSError) else None
    return 1, [f"error: {text}"] if text else []


EXAMPLE = "configs/tiny.yaml"
SYNONYMS = {
    **dict.fromkeys(("train", "finetune", "start", "resume"), "run"),
    **{"check": "validate", "list": "status", "show": "report", "compare": "diff", "clean": "gc"},
    **{"help": "--help", "version": "--version"},
}
"""Names of commands elsewhere, and the command or option here."""
CONFIG_OPTIONS = ("-c", "-f", "--cfg", "--config", "--config-file", "--config-path", "--file", "--yaml")
"""Options by which other tools take the config; here it is an argument."""
OUTPUT_OPTIONS = ("output_dir", "output", "out_dir", "save_dir", "o")
"""Options by which other tools take the folder of the outputs."""
OF_THE_WHOLE = ("model", "template", "seed", "question")
"""Settings at the top of a config that have one value."""


class Correction:
    """Goes through the words of a command line once, collects what is wrong, and puts the right line together."""

    def __init__(self, verbs: Mapping[str, Any]) -> None:
        """`verbs`: the commands by name, as Click knows them; their `params` say what each takes."""
        self.verbs = verbs
        self.reasons: list[str] = []
        self.settings: dict[str, list[str]] = {}
        """Settings that were written as options, by whose they are."""
        self.certain = True
        """Whether the right line is known."""

    def sentence(self, words: Sequence[str], otherwise: str) -> str:
        """What is wrong and what to write; `otherwise` where nothing wrong was found here."""
        verb, *rest = self.command(list(words))
        line = shlex.join(["pipeline", verb, *(self.arguments(verb, rest) if verb in self.verbs else rest)])
        for owner, names in self.settings.items():
            is_one = f"{names[0]} is a setting" if len(names) == 1 else f"{', '.join(names)} are settings"
            self.reasons.append(f"{is_one} of {owner} and need{'s' if len(names) == 1 else ''} `--set`")
        if not self.reasons:
            return otherwise
        return "; ".join(self.reasons) + (f": write `{line}`" if self.certain else "")

    def command(self, words: list[str]) -> list[str]:
        """The words with the right command in front."""
        place = next((place for place, word in enumerate(words) if not word.startswith("-")), None)
        if place is None:
            self.certain = False
            missing = f"a command is missing, such as `run` in `pipeline run {EXAMPLE}`"
            self.reasons.append(f"`pipeline` has no option `{words[0]}`" if words else missing)
            self.reasons.append("`pipeline --help` shows them all")
            return words or [""]
        before, word, rest = words[:place], words[place], words[place + 1 :]
        if word in self.verbs:
            self.reasons += [f"`{before[0]}` goes after the command"] if before else []
            return [word, *rest, *before]
        return self.meant(word, [*rest, *before])

    def meant(self, word: str, rest: list[str]) -> list[str]:
        """The words with a command in place of `word`, which is not one."""
        from stages import kinds
        from stages.runtime.errors import nearest

        if _is_yaml(word):
            self.reasons.append(f"`{word}` is a config, not a command")
            return ["run", word, *rest]
        stages = stage_kinds(next(filter(_is_yaml, (part.rpartition("=")[2] for part in rest)), None))
        known = [*self.verbs, *SYNONYMS, *kinds(), *stages]
        close = re.search("did you mean `(.+)`", nearest(word, known))
        right = word if word in known else close[1] if close else ""
        if right in stages or right in kinds():
            name = right if right in stages else next((name for name, kind in stages.items() if kind == right), right)
            one = f"`{word}` is" if word == name else f"`{word}` is not a command, but `{name}` is"
            self.reasons.append(f"{one} a stage" + (", not a command" if word == name else ""))
            return ["run", *rest, "--until", name]
        self.reasons.append(f"`{word}` is not a command" + ("" if right else nearest(word, self.verbs)))
        self.certain = bool(right)
        return [SYNONYMS.get(right, right or word), *(rest if SYNONYMS.get(right, "")[:1] != "-" else [])]

    def arguments(self, verb: str, words: list[str]) -> list[str]:
        """The right words after a command: its arguments, then its options."""
        options = {name: param for param in self.verbs[verb].params for name in param.opts if name.startswith("-")}
        wanted = [param for param in self.verbs[verb].params if param.param_type_name == "argument"]
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
                right += self.option(verb, name, value, options, config)
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
        """Arguments, known options with their values, and unknown options each with its value."""
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
        """`a.b=1`, as Hydra takes it."""
        name, _, value = word.partition("=")
        if "." not in name and (paths := _paths(name, config)):
            return self.setting(name, value, paths)
        self.reasons.append(f"`{word}` needs `--set`")
        return ["--set", word]

    def setting(self, name: str, value: str, paths: Sequence[str]) -> list[str]:
        """A setting of the config under its own name; the first of the stages that take it gets the value."""
        stages = [f"`{path.partition('.')[0]}`" for path in paths if "." in path]
        owner = f"stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}" if stages else "the config"
        self.settings.setdefault(owner, []).append(f"`{name}`")
        return ["--set", f"{paths[0]}={value}"]

    def option(
        self, verb: str, name: str, value: str | None, options: Mapping[str, Any], config: str | None
    ) -> list[str]:
        """An option that the command does not have: a setting of the config, a slip, or a name from elsewhere."""
        from stages.runtime.errors import nearest

        word = name.lstrip("-").replace("-", "_")
        if word in OUTPUT_OPTIONS and "--saves" in options:
            self.reasons.append("outputs go to `--saves`")
            return ["--saves", value or "DIR"]
        if "--set" in options and (paths := _paths(word, config)):
            return self.setting(name, value or "true", paths)
        self.certain = False
        near = nearest(word.replace("_", "-"), [option.lstrip("-") for option in options])
        hint = re.sub("`(.+?)`", r"`--\1`", near)
        if "--set" in options and "did you mean" not in near:
            hint = _clause(word) or hint
        self.reasons.append(f"`pipeline {verb}` has no option `{name}`{hint}")
        return []


def is_assignment(word: str) -> bool:
    """Whether a word is written as `sft.trainer.max_steps=3` and names no file."""
    return bool(re.match(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", word)) and not _is_yaml(word) and not os.path.exists(word)


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _is_config_option(name: str) -> bool:
    return name.replace("_", "-") in CONFIG_OPTIONS


def _is_value(word: str, option: str) -> bool:
    """Whether a word after an unknown option is its value. A config after an option such as `--bf16` is not."""
    return not re.match("--?[A-Za-z]", word) and (_is_config_option(option) or not _is_yaml(word))


def stage_kinds(config: str | Path | None) -> dict[str, str]:
    """The stages that are written in a config, each with its kind; empty if the file cannot be read."""
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
    """Where a config takes a setting: `sft.trainer.max_steps` for each stage that has it, or `seed`."""
    from pipeline.config.library_names import MANAGED, MOVED
    from pipeline.config.settings import settings
    from stages import find, kinds

    if name in OF_THE_WHOLE:
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


def _clause(name: str) -> str | None:
    """What the config would say of a setting with this name, where that helps; None elsewhere."""
    from pipeline.config.settings import problem
    from stages import find

    clause = problem(find("sft").settings["trainer"], name, None)
    return None if clause is None or clause.endswith(f"has no setting `{name}`") else f", and {clause}"
