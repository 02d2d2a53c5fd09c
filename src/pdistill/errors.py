"""What a user did wrong, told in one line; the command line prints it without a trace."""


class UserError(Exception):
    """A mistake in the input. The message says what was wrong, what was expected and how to fix it."""

    exit_code = 2


class Interrupted(BaseException):
    """The run was asked to stop, by `signal`, and has kept what it had. Not for `except Exception` to catch."""

    exit_code = 130

    def __init__(self, message: str = "", signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


def printable(text: object) -> str:
    """A text of unknown origin in one line: line breaks and what a terminal obeys become \\n, \\x1b, ..."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The error in one line: its text's first line, or the name of its class."""
    lines = str(error).strip().splitlines()
    return (lines[0][:limit] if lines else "") or type(error).__name__
