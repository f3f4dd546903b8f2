"""The one error a user is meant to read, and what of texts from outside may be shown."""

import errno
import re

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors that mean a full disk."""
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What moves a cursor, breaks or turns a line, or is no character: half of a UTF-16 pair, a byte that is no UTF-8."""
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


class DownresError(Exception):
    """Bad input or an impossible request, said in one sentence: the rule, the value, what to do next.

    The command line prints it and exits with `exit_code`; Python callers catch it.
    """

    exit_code = 2

    def __str__(self) -> str:
        return shown(super().__str__())


def shown(text: object) -> str:
    r"""A text from outside (the name of a file, a class, a model) as it may stand in a sentence, a table or a page.

    What would act instead of being seen is escaped: `\n` and `\x1b`, `\u202e` that turns the direction of writing, and
    `\xff` for a byte that is no UTF-8. All else stays, so that what was shown already stays as it is.
    """
    return _HIDDEN.sub(lambda found: _escaped(found[0]), str(text))


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a name that is no UTF-8
        code -= 0xDC00
    return _NAMED.get(letter) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of what was raised, without colours, the number of a system's error and the full stop, to stand in a
    sentence of ours.

    otherwise: for an error without words; else the name of its class.
    """
    text = re.sub(r"\x1b\[[0-9;]*m|^\[(Errno|WinError) -?\d+\] ", "", str(error)).strip()
    return shown((text.splitlines() or [otherwise or type(error).__name__])[0].rstrip("."))
