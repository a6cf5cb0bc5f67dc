"""Chat templates in a plan: the rows of a stage's data that its template cannot be used for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.chat.encoding import SHOWN
from stages.chat.shapes import Shape, Shapes
from stages.chat.trial import DAY, Trial
from stages.model.facts import ANY_DATA, Facts, unknown_marks

FIXED_DATE = (
    f"the chat template writes the date of the day; it is fixed to {DAY:%d %B %Y}, in training and in the template "
    "that is saved"
)


@dataclass(frozen=True)
class Refusals:
    """The rows of a data set that a template cannot be used for."""

    rows: int
    why: Mapping[str, list[str]]
    """The first reasons, and for each of them the places of the first rows."""
    marks: str | None
    """The problem of special tokens that the template writes for these rows only, and the tokenizer does not have."""


@dataclass(frozen=True)
class Templates:
    """The templates of a plan; each is tried once with each shape of conversations."""

    known: dict[tuple[str, str, str, Shape, bool], str | None] = field(default_factory=dict)

    def refusals(self, template: str, facts: Facts, shapes: Shapes, *, answered: bool) -> Refusals:
        """Try a template with the shapes of a data set; `answered`: its answers are trained on (`try_shape`)."""
        trial = Trial(template, facts.tokenizer, facts.has_token)
        usual = trial.unknown(ANY_DATA)  # `check_template` has reported them
        marks = [mark for mark in trial.unknown(shapes.all()) if mark not in usual]
        rows, why = 0, dict[str, list[str]]()
        for of_row, (count, first) in shapes.counted():
            found = [self._refusal(trial, facts, shape, answered) for shape in of_row]
            reason = next((reason for reason in found if reason is not None), None)
            if reason is not None:
                rows += count
                if reason in why or len(why) < SHOWN:
                    why[reason] = [*why.get(reason, []), *first][:SHOWN]
        return Refusals(rows, why, unknown_marks(marks, facts)[1] if marks else None)

    def _refusal(self, trial: Trial, facts: Facts, shape: Shape, answered: bool) -> str | None:
        key = (trial.template, facts.tokens, trial.end, shape, answered)
        if key not in self.known:
            self.known[key] = trial.refusal(shape, answered=answered)
        return self.known[key]
