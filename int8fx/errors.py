"""What a user can put right."""


class UserError(Exception):
    """Names what was given and what is allowed; the command shows it as one line."""
