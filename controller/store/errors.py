"""What can go wrong with the database, each with one line that says what to do next."""


class StoreError(Exception):
    """The database cannot be used; the message is one clear line for an operator."""


class LeaseLostError(StoreError):
    """Another controller has taken the lease: nothing may be written any more."""


class UnknownIdError(LookupError):
    """No job, incident or other thing has this id."""
