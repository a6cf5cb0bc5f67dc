"""Errors for users, and the sentence for any error that a user can fix."""

import errno
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

Problem = tuple[str, str]
"""The dotted path of a setting in its stage, such as `trainer.beta`, and what is wrong with it."""


class PipelineError(Exception):
    """An error whose message is for the user: whole sentences, shown without a traceback."""

    exit_code = 1


class StageError(PipelineError):
    """An error in a stage that the user can fix. Its message says where, what, and what to do now."""


class Interrupted(PipelineError):
    """A signal stopped the run; the next `run` resumes it."""

    exit_code = 75


def nearest(word: str, known: Iterable[str], moved: Mapping[str, str] | None = None) -> str:
    """The clause with the known word nearest to a word; with all known words when none is near and they are few.

    `moved`: names in other versions or tools → today's name, or advice.
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


OUT_OF_MEMORY = "out of memory"
KILLED = "one of its processes was ended by signal 9 SIGKILL (kill -9, or the system ran out of memory)"
DISK_FULL = "the disk is full; free space and run again, what was finished is kept"
MORE_MEMORY = "end other programs, or run on a machine with more memory"
_NO_MEMORY = "can't allocate memory"  # torch on the CPU, as a RuntimeError


class ProcessKilled(MemoryError):
    """A process that works for this one was killed, as the kernel does when memory runs out."""


def lack_of_memory(error: BaseException) -> str:
    """What is known of an error that means a lack of memory: that memory ran out, or that a process was killed."""
    return KILLED if isinstance(error, ProcessKilled) else OUT_OF_MEMORY


def explain(error: BaseException, memory: str = MORE_MEMORY) -> str | None:
    """The sentence for an error that the user can fix; None for an internal error.

    `memory`: what to do about a lack of memory, as a clause.
    """
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        return f"{lack_of_memory(error)}; {memory}"
    if _disk_full(error):
        return DISK_FULL
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write `{error.filename}` ({error.strerror}); choose another folder with `--saves DIR`"
    return None


def _disk_full(error: BaseException) -> bool:
    """Whether an error means ENOSPC: by its number, or by the words of torch and safetensors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = ("No space left on device", "inline_container.cc", "os error 28")
    return any(word in str(error) for word in words)
