"""The cleaning steps that `clean:` takes, and their settings."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stages.runtime.errors import nearest

# Settings

_LANGUAGES = Literal["zh", "en"]
_ACTIONS = Literal["mask", "count"]


class Plain(BaseModel):
    """A step without settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["whitespace", "html", "width", "exact_duplicates"]
    """`whitespace`: every blank a plain one, none double or at a line's end, at most one empty line; no invisible
    characters. Indentation and fenced code stay.

    `html`: HTML's own tags, comments, scripts and entities; `<` in `P<0.05` stays, so does what is between backticks.

    `width`: full-width letters, digits and signs as ASCII; Chinese punctuation, `²` and `㎎` stay.

    `exact_duplicates`: rows that are the same as an earlier one, system prompt and all, but for width and blanks."""


class Length(BaseModel):
    """Keep rows that say neither too little nor too much, in characters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["length"]
    min: int | None = Field(None, ge=1)
    max: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Length":
        if self.min is None and self.max is None:
            raise ValueError("`length` needs `min`, `max` or both, in characters")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min` is {self.min}, more than `max`, {self.max}; no row is both")
        return self


class Language(BaseModel):
    """Keep rows in one language, told by its script alone: there is no model, and `en` is any Latin script.

    Counted are Han characters, kana, Hangul syllables, and words of other scripts, so that `阿莫西林（amoxicillin）` is
    four to one. `share` of them must be Han, or Latin words. Chinese with kana for more than a tenth of its Han
    characters is Japanese. A row with nothing to count stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["language"]
    name: _LANGUAGES
    share: float = Field(0.5, gt=0, le=1)


class RepeatedLines(BaseModel):
    """Keep rows no text of which repeats its own lines too much, as scraped pages and runaway answers do.

    `share` of a text's characters may be in lines that it had before, and 0.2 is what Gopher allows (Rae et al., 2021,
    table A1); lines with fewer than five letters or digits, such as brackets and table rules, do not count. No line is
    taken out, because songs and rows of examples repeat theirs, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["repeated_lines"]
    share: float = Field(0.2, ge=0, lt=1)


class NearDuplicates(BaseModel):
    """Drop rows that say nearly what an earlier kept row says: Jaccard similarity over character 5-grams.

    Compared without blanks, width and case. Two rows that differ in a dose alone may well be near duplicates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["near_duplicates"]
    similarity: float = Field(0.8, ge=0.3, le=1)


class PersonalData(BaseModel):
    """Mask or only count e-mail addresses, Chinese identity card numbers (18 characters, checksum) and mobile numbers.

    Names, addresses, landlines and accounts of messengers are not found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["personal_data"]
    action: _ACTIONS = "mask"


class Contamination(BaseModel):
    """Drop rows that share `ngram` characters in a row with a row of another data set, such as an exam.

    Compared are letters and digits alone (NFKC, lower case), question and answer as one text. What both sides have
    around every question counts too, so keep prompts such as `请回答下面的单选题` out of one of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["contamination"]
    against: list[str] = Field(min_length=1)
    ngram: int = Field(13, ge=5)


Step = Plain | Length | Language | RepeatedLines | NearDuplicates | PersonalData | Contamination

_KINDS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("whitespace", "html", "width", "exact_duplicates"), Plain),
    "length": Length,
    "language": Language,
    "repeated_lines": RepeatedLines,
    "near_duplicates": NearDuplicates,
    "personal_data": PersonalData,
    "contamination": Contamination,
}
# The setting that `{language: zh}` means, and what it may be.
_SHORT = {"language": ("name", get_args(_LANGUAGES)), "personal_data": ("action", get_args(_ACTIONS))}
_BARE = {"length": "{min: 5, max: 4000}", "language": "zh", "contamination": "{against: [exam]}"}  # none has a default


def _named(written: object) -> object:
    """`html` or `{length: {min: 5}}`, as YAML has it, with the name under `step`; ValueError when it is neither."""
    if isinstance(written, BaseModel) or (isinstance(written, dict) and "step" in written):
        return written  # as a dump has it
    if isinstance(written, str):
        name, settings = written, None
    elif isinstance(written, dict) and len(written) == 1:
        name, settings = next(iter(written.items()))
    elif isinstance(written, dict) and written:
        raise ValueError(f"{_listed(written)} stand in one mapping; give each step its own, as `{{name: …}}`")
    else:
        raise ValueError("a step is a name, such as `html`, or one with settings, such as `{length: {min: 5}}`")
    if name not in _KINDS:
        raise ValueError(f"there is no cleaning step `{name}`{nearest(str(name), _KINDS)}")
    if settings is None and name in _BARE:
        raise ValueError(f"`{name}` needs settings, such as `{name}: {_BARE[name]}`")
    short, choices = _SHORT.get(name, ("", ()))
    if short and settings is not None and not isinstance(settings, dict):
        settings = {short: settings}
    known = [setting for setting in _KINDS[name].model_fields if setting != "step"]
    if settings is not None and not isinstance(settings, dict):
        there = f"its settings as a mapping: {_listed(known)}" if known else "no settings"
        raise ValueError(f"`{name}` takes {there}")
    for setting in settings or {}:
        if setting not in known:
            there = nearest(str(setting), known) or "; it takes none"
            raise ValueError(f"`{name}` has no setting `{setting}`{there}")
    if short and settings and short in settings and settings[short] not in choices:
        raise ValueError(f"`{name}` is `{settings[short]}`{nearest(str(settings[short]), choices)}")
    return {"step": name, **(settings or {})}


def _once(steps: list[Step]) -> list[Step]:
    for name, count in Counter(step.step for step in steps).items():
        if count > 1:
            raise ValueError(f"`{name}` is there {count} times; keep one")
    return steps


def _listed(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


Steps = Annotated[
    list[Annotated[Annotated[Step, Field(discriminator="step")], BeforeValidator(_named)]], AfterValidator(_once)
]
"""What `clean:` takes: `[html, {length: {min: 5}}, {language: zh}, near_duplicates]`."""
