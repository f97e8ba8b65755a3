"""The one exception that a user is meant to see."""


class DalleError(Exception):
    """A fault that the user can mend: one line saying what was expected, what was found, what to do. Exit status 1."""
