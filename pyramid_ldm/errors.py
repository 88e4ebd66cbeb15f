"""The one exception that means: the input is wrong, the program is not."""


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, how to mend it.

    The command line prints it without a traceback and exits with 2.
    """
