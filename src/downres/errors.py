"""The one error a user is meant to read."""


class DownresError(Exception):
    """Bad input or an impossible request, said in one sentence: the rule, the value, what to do next.

    The command line prints it and exits with `exit_code`; Python callers catch it.
    """

    exit_code = 2
