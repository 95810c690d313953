"""The one exception that is the user's to put right."""


class UserError(ValueError):
    """Something the user can put right; executables print it as one line and exit with code 2."""
