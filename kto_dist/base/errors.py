"""The one exception that means "the user can fix this".

`UserError` carries the value, the rule and the remedy in its message. Commands print it without a traceback and
exit 2; everything else is a failure of ours and exits 1 with its traceback.
"""


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a path, a row. The message is the whole report."""
