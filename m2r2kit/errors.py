"""The one way in which this kit says that an input cannot be used."""


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """
