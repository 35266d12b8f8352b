"""Errors that call an argument what the caller calls it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Rename arguments in the ValueErrors and TypeErrors that are raised in here.

    Args:
        names: how the caller knows an argument, as a flag or under another function's name, by the
            name that the code in here has for it.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        words = "|".join(map(re.escape, names))
        said = re.sub(rf"\b({words})\b", lambda match: names[match[1]], str(error))
        if said != str(error):
            error.args = (said,)
        raise
