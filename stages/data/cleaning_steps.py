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
    """`whitespace`: single plain blanks, none at the end of a line, at most one empty line in a row, no invisible
    characters. Indentation and fenced code stay.

    `html`: removes HTML's tags, comments and scripts and resolves its entities. `<` in `P<0.05` stays, and so does text
    between backticks.

    `width`: full-width letters, digits and signs become ASCII; Chinese punctuation, `²` and `㎎` stay.

    `exact_duplicates`: drops rows that are the same as an earlier row, system prompt included, whatever their width and
    blanks."""


class Length(BaseModel):
    """Keep rows whose texts together have from `min` to `max` characters."""

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
    """Keep rows in one language, recognised by script alone, without a model: `en` is any language in Latin script.

    Han characters, kana, Hangul syllables and words of other scripts count one each: `阿莫西林（amoxicillin）` is four
    to one. At least `share` of them must be Han characters (`zh`) or Latin words (`en`). Text with more than one kana
    for ten Han characters is Japanese. A row with nothing to count stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["language"]
    name: _LANGUAGES
    share: float = Field(0.5, gt=0, le=1)


class RepeatedLines(BaseModel):
    """Drop rows with a text that repeats its own lines too much, as scraped pages and runaway answers do.

    At most `share` of a text's characters may be in lines that repeat an earlier line of the text; 0.2 is Gopher's
    limit (Rae et al., 2021, table A1). Lines with fewer than five letters or digits, such as brackets and table rules,
    do not count. Lines are never removed from a text, because songs and lists of examples repeat lines too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["repeated_lines"]
    share: float = Field(0.2, ge=0, lt=1)


class NearDuplicates(BaseModel):
    """Drop rows whose Jaccard similarity to an earlier kept row, over character 5-grams, is at least `similarity`.

    Blanks, width and case do not count. Two rows that differ only in a dose can be near duplicates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["near_duplicates"]
    similarity: float = Field(0.8, ge=0.3, le=1)


class PersonalData(BaseModel):
    """Mask or only count e-mail addresses, Chinese identity card numbers (18 characters, checksum) and mobile numbers.

    Names, postal addresses, landlines and accounts of messengers are not recognised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["personal_data"]
    action: _ACTIONS = "mask"


class Contamination(BaseModel):
    """Drop rows that share `ngram` consecutive characters with a row of another data set, such as an exam.

    Only letters and digits are compared (NFKC, lower case), question and answer as one text. Text that both data sets
    have around every question counts too: remove prompts such as `请回答下面的单选题` from one of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["contamination"]
    against: list[str] = Field(min_length=1)
    ngram: int = Field(13, ge=5)


Step = Plain | Length | Language | RepeatedLines | NearDuplicates | PersonalData | Contamination

_STEPS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("whitespace", "html", "width", "exact_duplicates"), Plain),
    "length": Length,
    "language": Language,
    "repeated_lines": RepeatedLines,
    "near_duplicates": NearDuplicates,
    "personal_data": PersonalData,
    "contamination": Contamination,
}
# Steps that have a short form, such as `{language: zh}`: the setting that it stands for, and its choices.
_SHORT = {"language": ("name", get_args(_LANGUAGES)), "personal_data": ("action", get_args(_ACTIONS))}
# Steps without defaults, and an example of their settings.
_NEEDS_SETTINGS = {"length": "{min: 5, max: 4000}", "language": "zh", "contamination": "{against: [exam]}"}


def _named(written: object) -> object:
    """A step as YAML has it, `html` or `{length: {min: 5}}`, as a mapping with the name under `step`.

    Raises:
        ValueError: it is neither a known name nor a known name with its settings.
    """
    if isinstance(written, BaseModel) or (isinstance(written, dict) and "step" in written):
        return written  # a step that was validated or dumped before
    if isinstance(written, str):
        name, settings = written, None
    elif isinstance(written, dict) and len(written) == 1:
        name, settings = next(iter(written.items()))
    elif isinstance(written, dict) and written:
        raise ValueError(f"{_listed(written)} are in one mapping; give each step its own, as `{{name: …}}`")
    else:
        raise ValueError("a step is a name, such as `html`, or one with settings, such as `{length: {min: 5}}`")
    if name not in _STEPS:
        raise ValueError(f"there is no cleaning step `{name}`{nearest(str(name), _STEPS)}")
    if settings is None and name in _NEEDS_SETTINGS:
        raise ValueError(f"`{name}` needs settings, such as `{name}: {_NEEDS_SETTINGS[name]}`")
    short, choices = _SHORT.get(name, ("", ()))
    if short and settings is not None and not isinstance(settings, dict):
        settings = {short: settings}
    known = [setting for setting in _STEPS[name].model_fields if setting != "step"]
    if settings is not None and not isinstance(settings, dict):
        wanted = f"its settings as a mapping: {_listed(known)}" if known else "no settings"
        raise ValueError(f"`{name}` takes {wanted}")
    for setting in settings or {}:
        if setting not in known:
            hint = nearest(str(setting), known) or "; it takes none"
            raise ValueError(f"`{name}` has no setting `{setting}`{hint}")
    if short and settings and short in settings and settings[short] not in choices:
        raise ValueError(f"`{name}` is `{settings[short]}`{nearest(str(settings[short]), choices)}")
    return {"step": name, **(settings or {})}


def _once(steps: list[Step]) -> list[Step]:
    """The steps. Raises ValueError when a step is listed twice."""
    for name, count in Counter(step.step for step in steps).items():
        if count > 1:
            raise ValueError(f"`{name}` is listed {count} times; keep one")
    return steps


def _listed(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


Steps = Annotated[
    list[Annotated[Annotated[Step, Field(discriminator="step")], BeforeValidator(_named)]], AfterValidator(_once)
]
"""What `clean:` takes: `[html, {length: {min: 5}}, {language: zh}, near_duplicates]`."""
