"""What is minimised: batches with roles, rows, terms, and the objective made of them."""

from selfaug.objective.batch import IGNORE, Role, Span, TokenBatch
from selfaug.objective.objective import NLL, Losses, Objective
from selfaug.objective.terms import LogitAlignment, Term

__all__ = ["IGNORE", "NLL", "LogitAlignment", "Losses", "Objective", "Role", "Span", "Term", "TokenBatch"]
