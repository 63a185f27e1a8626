"""What is minimised: batches with roles, rows, terms, and the objective made of them."""

from selfaug.objective.batch import IGNORE, TASK, Role, Span, TokenBatch
from selfaug.objective.ewc import EWC
from selfaug.objective.hidden import HiddenAlignment
from selfaug.objective.objective import NLL, Losses, Objective
from selfaug.objective.parameters import L2SP, OLoRA, Orthogonal
from selfaug.objective.terms import LogitAlignment, ParameterTerm, States, Term, TokenWeights
from selfaug.objective.weights import DFT, EAFT

__all__ = [
    "DFT",
    "EAFT",
    "EWC",
    "IGNORE",
    "L2SP",
    "NLL",
    "TASK",
    "HiddenAlignment",
    "LogitAlignment",
    "Losses",
    "OLoRA",
    "Objective",
    "Orthogonal",
    "ParameterTerm",
    "Role",
    "Span",
    "States",
    "Term",
    "TokenBatch",
    "TokenWeights",
]
