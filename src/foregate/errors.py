"""The one exception that users see."""


class ForegateError(Exception):
    """Something the user can mend: the message is one line that says what, where and how.

    The command line prints it as it is and exits with code 2; nothing half-written is left behind.
    """


def first_line(error: BaseException, length: int = 160) -> str:
    """The first line of another library's error, cut to `length`: what fits into one line of ours."""
    text = str(error).strip()
    return text.splitlines()[0][:length] if text else type(error).__name__
