"""Why the Hub did not give something, as far as an error tells, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

_MEANINGS = {
    401: ("it takes no such token", "Log in anew with `hf auth login`, or set HF_TOKEN."),
    403: ("the token may not read it", "Give the token the right to read it, on the Hub's page of tokens."),
    429: ("too many requests came from here", "Wait some minutes; the Hub allows more to those who log in."),
}
_FAULT = ("it has a fault", "Try again later.")


def why_not(error: BaseException) -> tuple[str, str] | None:
    """The reason in a few words and what to do; None where the error does not tell.

    An answer that names its own reason, as that there is no such repository, has a class of its own and is left to it.
    """
    for one in chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if type(one).__name__ == "HfHubHTTPError" and isinstance(status, int):
            said, hint = _MEANINGS.get(status, _FAULT if status >= 500 else ("", ""))
            return (f"{said} ({status})", hint) if said else None
    for one in chain(error):
        if type(one).__name__ in ("RemoteProtocolError", "ReadError"):
            return f"the download broke off: {first_line(one)}", "Run it again: whole files that came are kept."
        if isinstance(one, OSError) and one.errno and one.filename:  # of a file; a connection's has none
            return f"{one.filename}: {one.strerror}", "Let it be read and written, or set HF_HOME to another folder."
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def first_line(error: BaseException) -> str:
    """What it says, as far as a line goes; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
