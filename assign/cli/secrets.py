"""Passwords in what a user typed: masked before a command is stored in a file or shown."""

import re

MASK = "***"

_BEFORE_HOST = re.compile(r"(?<=://)([^\s:/?#@]*):(.*)@", re.DOTALL)
_BEFORE_HOST_IN_TEXT = re.compile(r"(?<=://)([^\s:/?#@]*):(\S*)@")
_IN_QUERY = re.compile(r"([?&][^=&#\s]*(?:passw|pwd|secret|token)[^=&#\s]*=)[^&#\s'\"]*", re.IGNORECASE)


def mask_argument(argument: str) -> str:
    """One argument of a command without the passwords of a URL in it.

    Examples:
        >>> mask_argument("--storage=postgresql://me:pass@word@host/db?sslpassword=x&a=b")
        '--storage=postgresql://me:***@host/db?sslpassword=***&a=b'
    """
    return _IN_QUERY.sub(rf"\1{MASK}", _BEFORE_HOST.sub(rf"\1:{MASK}@", argument))


def mask_text(text: str) -> str:
    """A message without the passwords of the URLs in it."""
    return _IN_QUERY.sub(rf"\1{MASK}", _BEFORE_HOST_IN_TEXT.sub(rf"\1:{MASK}@", text))
