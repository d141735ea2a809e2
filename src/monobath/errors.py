"""The one exception class for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in what the caller gave: the message names the value and the remedy.

    The command line prints the message on one line and exits with code 2; library callers can catch
    it as a `ValueError`.
    """
