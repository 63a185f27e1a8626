"""What is minimised: batches with roles, rows, terms, and the objective made of them."""

from selfaug.objective.batch import IGNORE, Role, Span, TokenBatch
from selfaug.objective.hidden import HiddenAlignment
from selfaug.objective.objective import NLL, Losses, Objective
from selfaug.objective.terms import LogitAlignment, States, Term

__all__ = [
    "IGNORE",
    "NLL",
    "HiddenAlignment",
    "LogitAlignment",
    "Losses",
    "Objective",
    "Role",
    "Span",
    "States",
    "Term",
    "TokenBatch",
]
