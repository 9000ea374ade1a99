"""The one exception family for what a user can mend."""


class UserError(Exception):
    """A mistake in the request, its inputs or its environment that the user can mend.

    The message is one line: what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with status 2.
    """


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read, or is not an InternViT."""
