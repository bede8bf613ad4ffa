"""Warnings. Errors are ValueError, TypeError, NotImplementedError, ``BudgetError`` and ``CudaError``."""


class BudgetWarning(UserWarning):
    """A byte budget was below the smallest plan, and the smallest plan was kept."""
