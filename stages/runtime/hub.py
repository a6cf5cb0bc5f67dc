"""What can go wrong with a request to the Hugging Face Hub: the errors, and what a user can do about each."""

import os

TOKEN = "HF_TOKEN"


def failures() -> tuple[type[BaseException], ...]:
    """The errors of a request: a refusal, no connection, a connection that breaks, a file that arrives damaged."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError, XetDownloadError

    # The base class of every error of the HTTP library that huggingface_hub uses (httpx, or httpx2).
    connection = HfHubHTTPError.__mro__[1]
    return (connection, OfflineModeIsEnabled, SafetensorsParsingError, XetDownloadError, OSError)


def refusal(error: BaseException) -> str:
    """What went wrong in brackets, and what to do, for the end of a sentence: `(it is gated); ask for access …`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # no snapshot here, after another error
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = os.environ.get(TOKEN)
    if isinstance(error, OfflineModeIsEnabled):
        return "(HF_HUB_OFFLINE is set); unset it"
    if isinstance(error, GatedRepoError):
        way = f"the account of {TOKEN} needs it" if token else f"set {TOKEN} to a token of that account"
        return f"(it is gated: access is granted to accounts); ask for access on its page of the Hub, and {way}"
    if isinstance(error, RevisionNotFoundError):
        return "(it has no such commit or branch); copy the 40 hex digits of a commit from its page of the Hub"
    if isinstance(error, RepositoryNotFoundError):
        way = f"check the name, and whether {TOKEN} may read it" if token else f"check the name, or set {TOKEN}"
        return f"(there is none of this name, or it is private); {way}"
    if status == 401:
        return f"({TOKEN} is not a valid token); make a token in the settings of the Hub, and set {TOKEN} to it"
    if status == 403:
        return f"(the account of {TOKEN} has no right to do this); use a token with that right"
    if status is not None and (status >= 500 or status == 429):
        return f"(it answers with status {status}); try again later"
    text = getattr(error, "server_message", None) or str(error)
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    return f"({first}); check name, commit, access and network"
