"""Every error that a user can meet.

PipelineError                exit code
  ConfigError          2     the YAML or the command line is wrong; carries every problem found
  StageError           1     a stage met something a user can mend (a bad row, a wrong template, …)
  StageFailed          1     a stage ended without a result; says which, why and where its log is
  GateClosed           3     a gate said no; what comes after was not run, and nothing is thrown away
  Interrupted         75     stopped by a signal; the next `run` goes on
  Busy                 1     another run holds the same folder
  NewerRecord          1     a later version of this project wrote the folder

Anything else that is raised is a fault of ours and shows its traceback.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class PipelineError(Exception):
    """A message for the user, whole sentences, with no traceback."""

    exit_code = 1


class ConfigError(PipelineError):
    """One or more problems of the YAML file or the command line, each one line."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class StageError(PipelineError):
    """Raised by a stage for what a user can mend: the message says where, what, and what to do now."""


class StageFailed(PipelineError):
    """A stage ended without a result."""


class GateClosed(PipelineError):
    """A gate of a finished evaluation said no."""

    exit_code = 3


class Interrupted(PipelineError):
    """A signal stopped the run; nothing is lost."""

    exit_code = 75


class Busy(PipelineError):
    """Another run is at work in the same folder."""


class NewerRecord(PipelineError):
    """A finished folder whose record this version cannot read, and must not take for damage."""


def nearest(word: str, known: Iterable[str], moved: Mapping[str, str] | None = None) -> str:
    """A clause that names the nearest right word, or the words there are when none is near.

    `moved` maps names that other versions or tools use to today's name (or to advice).
    """
    names = sorted(known)
    if moved and word in moved:
        return f"; it is now {moved[word]}"
    lower = {name.lower(): name for name in names}
    longer = sorted((name for name in lower if name.startswith(word.lower()) and len(word) > 3), key=len)
    close = longer[:1] or get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{lower[close[0]]}`?"
    if len(names) <= 12:
        return "; there is " + ", ".join(f"`{name}`" for name in names) if names else ""
    return ""
