"""Mask passwords in URLs before a command or a message is stored or shown."""

import re

MASK = "***"

_BEFORE_HOST = re.compile(r"(?<=://)([^\s:/?#@]*):(.*)@", re.DOTALL)
_BEFORE_HOST_IN_TEXT = re.compile(r"(?<=://)([^\s:/?#@]*):(\S*)@")
_IN_QUERY = re.compile(r"([?&][^=&#\s]*(?:passw|pwd|secret|token)[^=&#\s]*=)[^&#\s'\"]*", re.IGNORECASE)


def mask_argument(argument: str) -> str:
    """Return one argument of a command with the passwords of its URL masked.

    Examples:
        >>> mask_argument("--storage=postgresql://me:pass@word@host/db?sslpassword=x&a=b")
        '--storage=postgresql://me:***@host/db?sslpassword=***&a=b'
    """
    return _IN_QUERY.sub(rf"\1{MASK}", _BEFORE_HOST.sub(rf"\1:{MASK}@", argument))


def mask_text(text: str) -> str:
    """Return a message with the passwords of all its URLs masked."""
    return _IN_QUERY.sub(rf"\1{MASK}", _BEFORE_HOST_IN_TEXT.sub(rf"\1:{MASK}@", text))
