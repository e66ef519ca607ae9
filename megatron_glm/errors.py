"""The one base class of errors that a user can cure."""


class GLMError(ValueError):
    """An error whose message names the flag or file, its value, the rule and the cure.

    Entry points print it as one line without a traceback; anything else is a fault of the program
    and keeps its traceback.
    """
