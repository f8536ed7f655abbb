"""Private details out of texts that people are going to read: e-mail addresses and phone numbers."""

import re

# An apostrophe may stand in a name, as in o'brien@example.org, and no quotation mark may begin one.
_EMAIL = re.compile(r"[^\s@＠<>\"'()\[\],;:][^\s@＠<>\"()\[\],;:]*(?:@|＠|%40)[^\s@＠<>\"'()\[\],;:]+", re.IGNORECASE)
# Seven digits and more, alone or in groups: phone numbers of every country, and card and account numbers with them.
# Groups may be parted by up to three signs, as in "+49 (0) 30 / 1234-567", or by a comma without a space: one with a
# space most often parts a list.
_APART = r"[\s().\-‐‑‒–—―−/·_]"
_PHONE = re.compile(rf"[+＋]?\(?\d(?:(?:{_APART}{{0,3}}|,)\d){{6,}}", re.UNICODE)
_DATE = re.compile(r"(?:19|20)\d\d-[01]\d-[0-3]\d|[0-3]\d\.[01]\d\.(?:19|20)\d\d")
# 1,234,567 is a count, as are several such in a row; a phone number begins with 0 or has a group of another size.
_THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"
_COUNT = re.compile(rf"\(?{_THOUSANDS}(?:{_APART}{{1,3}}{_THOUSANDS})*", re.ASCII)


def mask(text: str) -> str:
    """The text with `[e-mail]` and `[phone]` in place of what looks like one; when in doubt, masked."""
    text = _EMAIL.sub("[e-mail]", text)
    return _PHONE.sub(lambda found: found[0] if _harmless(found[0]) else "[phone]", text)


def _harmless(number: str) -> bool:
    return bool(_DATE.fullmatch(number) or _COUNT.fullmatch(number))


def excerpt(text: str, length: int) -> str:
    """The start of a text, masked; an address that the cut would go through is masked whole."""
    # masked before it is cut, and from a bounded piece: a text may be megabytes
    masked = mask(text[: 4 * length + 1000])
    return masked if len(masked) <= length and len(text) <= 4 * length + 1000 else masked[:length].rstrip() + "…"
