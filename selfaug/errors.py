"""Errors that a user can cause.

Every one of them is a single sentence that names the setting and the fix. The entry points print that
sentence and exit with status 1; `debug=traceback` shows where it came from.
"""


class UserError(Exception):
    """Something the user can put right: the message names the setting and says how."""
