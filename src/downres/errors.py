"""The one error a user is meant to read, and what another error says in one line."""

import errno
import re

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors that mean a full disk."""


class DownresError(Exception):
    """Bad input or an impossible request, said in one sentence: the rule, the value, what to do next.

    The command line prints it and exits with `exit_code`; Python callers catch it.
    """

    exit_code = 2


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of what was raised, without colours and the full stop, to stand in a sentence of ours.

    otherwise: for an error without words; else the name of its class.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [otherwise or type(error).__name__])[0].rstrip(".")
