"""Warnings, and what commands say of errors: ValueError, TypeError, NotImplementedError, ``BudgetError``,
``CudaError``, and the system's own."""


def one_line(reason: Exception) -> str:
    """What went wrong, in one line; the system's own errors know only their file."""
    if isinstance(reason, OSError) and reason.filename is not None:
        return f"{reason.filename}: expected a file that can be used, got: {reason.strerror}"
    return " ".join(str(reason).split()) or type(reason).__name__


def first_line(reason: BaseException) -> str:
    """What went wrong, of errors of others that say more than a line."""
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]


class BudgetWarning(UserWarning):
    """A byte budget was below the smallest plan, and the smallest plan was kept."""
