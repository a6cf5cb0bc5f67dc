"""`trainer:` of a stage: settings of TRL, checked against the installed version before they are written."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.config import settings
from pipeline.config.library_names import MANAGED
from pipeline.tools.convert_parts import Arguments, Book, Kind, Noted, Part, is_off, plain_number, shown
from stages import find

EVERY = (["all"], ["all-linear"])  # how programs say that every linear layer gets an adapter
POINTLESS = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end")
BOOLEANS: Mapping[str, bool] = {
    **dict.fromkeys(("yes", "on", "true"), True),
    **dict.fromkeys(("no", "off", "false"), False),
}


class Trainer:
    """Collects the settings of one stage, and puts them into its part at the end."""

    def __init__(self, arguments: Arguments, book: Book) -> None:
        self.arguments, self.book = arguments, book
        self.found: dict[str, Any] = {}
        self.places: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether a setting is there and says something."""
        value = self.found.get(name)
        return not is_off(value.value if isinstance(value, Noted) else value)

    def set(self, name: str, value: Any, comment: str = "", place: str = "") -> None:
        """Set one, with a comment."""
        self.found[name] = Noted(value, comment) if comment else value
        self.places[name] = place or self.arguments.place(comment.partition(",")[0])

    def default(self, name: str, value: Any, comment: str) -> None:
        """Set one that is not there yet."""
        if name not in self.found:
            self.set(name, value, comment)

    def model(self, name: str, value: Any) -> None:
        """Set one of `model_init_kwargs`."""
        self.found["model_init_kwargs"] = {**self.found.get("model_init_kwargs", {}), name: value}

    def take_same(self, kind: str, stage: dict[str, Any], same: Mapping[str, str], read: Collection[str] = ()) -> None:
        """Take every argument that is a setting of TRL under its own name, or under the name in `same`.

        Settings of the stage itself go into `stage`. Arguments in `read` are left for the caller.
        """
        known = settings.settings(find(kind).settings["trainer"])
        for name in list(self.arguments.left):
            given = self.arguments.left[name]
            path = same.get(name, f"trainer.{name}" if name in known else "")
            head, _, word = path.rpartition(".")
            if not path or head == "lora" or word == "seed" or name in read:
                continue
            if given.value is None:
                self.arguments.left.pop(name)
            elif not head and word in find(kind).config.model_fields:
                stage[word] = Noted(self.arguments.take(name), name) if word != name else self.arguments.take(name)
            elif head and word in known:
                value, place = self.arguments.take(name), given.place
                self.set(word, _typed(known[word], value), name if word != name else "", place)

    def shared(self, kind: str) -> None:
        """Take what transformers' Trainer called otherwise in earlier versions, and the trackers."""
        take = self.arguments
        warmup = take.number("warmup_ratio")
        if warmup is not None and not is_off(warmup) and not self.has("warmup_steps"):
            self.set("warmup_steps", warmup, "warmup_ratio")
        if take.flag("group_by_length"):
            if kind in ("pt", "sft"):
                self.set("train_sampling_strategy", "group_by_length", "group_by_length")
            else:
                text = f"`group_by_length`: `{kind}` cannot sort rows by length"
                self.book.note("not supported", take.place("group_by_length"), text)
        trackers = [word for word in take.words("report_to") if word.lower() not in ("none", "null")]
        self.report_to(trackers)
        if kind == "pt" and "packing_strategy" not in self.found and self.has("packing"):
            self.set("packing_strategy", "wrapped", "texts run into one another, as there")

    def report_to(self, trackers: list[str]) -> None:
        """Add trackers to those that are set."""
        before = self.found.get("report_to", [])
        every = list(dict.fromkeys([*(before if isinstance(before, list) else [before]), *trackers]))
        if every:
            self.set("report_to", every[0] if len(every) == 1 else every)

    def finish(self, part: Part) -> None:
        """Check every setting, note what does not fit, and put the rest into the part."""
        reference = find(part.kind).settings["trainer"]
        held = part.settings.get("eval_data") or part.settings.get("eval_size")
        self._constant()
        for name, value in list(self.found.items()):
            plain = value.value if isinstance(value, Noted) else value
            place = self.places.get(name, part.place)
            problem = settings.problem(reference, name, plain)
            if problem is not None:
                managed = name in MANAGED[reference.rpartition(":")[2]]
                kind: Kind = "not supported" if "not supported" in problem else "not needed" if managed else "to do"
                self.book.note(kind, place, problem.removesuffix("; remove it"))
                del self.found[name]
            elif name in POINTLESS and not held:
                del self.found[name]
                if not is_off(plain):
                    text = f"`{name}: {shown(plain)}`: there are no held-out rows; add `eval_size: 0.05`"
                    self.book.note("differs", place, text)
        if not held and part.settings.pop("early_stopping", None) is not None:
            text = "`early_stopping`: there are no held-out rows; add `eval_size: 0.05`"
            self.book.note("differs", part.place, text)
        self._evaluation_steps()
        part.settings["trainer"] = self.found

    def _constant(self) -> None:
        """transformers has no warmup in the schedule `constant`, and leaves `warmup_steps` without a word."""
        schedule = self.found.get("lr_scheduler_type")
        if (schedule.value if isinstance(schedule, Noted) else schedule) != "constant" or not self.has("warmup_steps"):
            return
        warmup = self.found.pop("warmup_steps")
        name = warmup.comment if isinstance(warmup, Noted) else "warmup_steps"
        text = f"`{name}`: the schedule `constant` has no warmup; `constant_with_warmup` has one"
        self.book.note("not needed", self.places["warmup_steps"], text)

    def _evaluation_steps(self) -> None:
        """transformers evaluates every `logging_steps`, 500 by default, where TRL logs every 10."""
        when = self.found.get("eval_strategy")
        if (when.value if isinstance(when, Noted) else when) == "steps" and "eval_steps" not in self.found:
            self.default("logging_steps", 500, "the default there")


def adapter(
    rank: Any, alpha: Any, *, dropout: Any = 0, targets: Sequence[str] = (), saved: Sequence[str] = (), **flags: Any
) -> dict[str, Any]:
    """`lora:`. `targets` that mean every linear layer are the default here; `flags` are written where they are on."""
    lora: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    lora |= {} if is_off(dropout) else {"lora_dropout": dropout}
    lora |= {"target_modules": list(targets)} if targets and list(targets) not in EVERY else {}
    lora |= {"modules_to_save": list(saved)} if saved else {}
    return lora | {name: True for name, on in flags.items() if not is_off(on)}


def _typed(setting: settings.Setting, value: Any) -> Any:
    """Words that YAML 1.1 and command lines use for true and false, where the setting wants that; whole floats."""
    if isinstance(value, str) and "bool" in setting.annotation and "str" not in setting.annotation:
        return BOOLEANS.get(value.lower(), value)
    if isinstance(value, Mapping) and setting.name == "optim_args":
        return ",".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, str) and "str" not in setting.annotation:
        value = plain_number(value)
    if isinstance(value, bool) and setting.name in ("eval_strategy", "save_strategy", "logging_strategy"):
        return value if value else "no"
    if isinstance(value, float) and value.is_integer() and "float" not in setting.annotation:
        return int(value)
    return value
