"""Every error that a user can meet.

PipelineError                exit code
  ConfigError          2     the YAML or the command line is wrong; carries every problem found
  StageError           1     a stage met something that the user can fix (a bad row, a wrong template, …)
  StageFailed          1     a stage ended without a result; the message names the stage, the reason and its log
  GateClosed           3     a gate failed; later stages were not run, and all results are kept
  Interrupted         75     stopped by a signal; the next `run` goes on
  Busy                 1     another run holds the same folder
  NewerRecord          1     a later version of this project wrote the folder

Any other exception is an internal error and shows its traceback.
"""

from collections.abc import Iterable

from stages.runtime.errors import PipelineError


class ConfigError(PipelineError):
    """One or more problems of the YAML file or the command line, each one line."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class StageFailed(PipelineError):
    """A stage ended without a result."""


class GateClosed(PipelineError):
    """A gate of a finished evaluation failed."""

    exit_code = 3


class Busy(PipelineError):
    """Another run is at work in the same folder."""


class NewerRecord(PipelineError):
    """A finished folder with a record of a later version, which is not damage."""
