"""What a user did wrong, told in one line; the command-line entry points print it without a trace."""


class UserError(Exception):
    """A mistake in the input. The message says what was wrong, what was expected and how to mend it."""

    exit_code = 2


class Interrupted(BaseException):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has kept what it had. No `except Exception` is to eat it."""

    exit_code = 130
