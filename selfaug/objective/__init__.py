"""What is minimised: batches with roles, rows, terms, and the objective made of them."""

from selfaug.objective.batch import IGNORE, TASK, Role, Span, TokenBatch
from selfaug.objective.hidden import HiddenAlignment
from selfaug.objective.objective import NLL, Losses, Objective
from selfaug.objective.terms import LogitAlignment, ParameterTerm, States, Term, TokenWeights

__all__ = [
    "IGNORE",
    "NLL",
    "TASK",
    "HiddenAlignment",
    "LogitAlignment",
    "Losses",
    "Objective",
    "ParameterTerm",
    "Role",
    "Span",
    "States",
    "Term",
    "TokenBatch",
    "TokenWeights",
]
