"""The one exception that the command line turns into a one-line message."""


class UserError(Exception):
    """A mistake that the user can mend. The message names the argument and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
