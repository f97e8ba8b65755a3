"""The one exception that a user is meant to see, and what text of strangers becomes before it is shown."""

import re

LONGEST = 1500  # characters of a message
# Control characters, which a terminal obeys, line separators, and marks that reverse the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
_NOT_IN_PAGES = re.compile(f"(?![\n\t]){_CONTROLS.pattern}")


def printable(text: str) -> str:
    """A text without what a terminal obeys: control characters become escapes such as `\\x1b`."""
    return _NOT_IN_PAGES.sub(_escaped, text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text as one line that is safe to print; the middle of a long one is left out."""
    if len(text) > 4 * longest:
        text = f"{text[: 2 * longest]} ... {text[-2 * longest :]}"
    line = _CONTROLS.sub(_escaped, " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-longest // 3 :]}"


def _escaped(found: "re.Match[str]") -> str:
    return found[0].encode("unicode_escape").decode()


class DalleError(Exception):
    """A fault that the user can mend: one line saying what was expected, what was found, what to do. Exit status 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))
