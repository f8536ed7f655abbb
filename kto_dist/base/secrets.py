"""Passwords and tokens of URLs, kept out of whatever is shown, logged or written."""

import re

_USER = re.compile(r"(?<=://)[^/\s]*@")
_PARAMETER = re.compile(r"([?&;][^=&\s]*(?:passw|pwd|token|secret|key|credential|signature)[^=&\s]*=)[^&;\s'\"]+", re.I)


def masked(text: str) -> str:
    """The text with `***` in place of each URL's user and password, and of parameters that are named like secrets."""
    return _PARAMETER.sub(r"\1***", _USER.sub("***@", text))
