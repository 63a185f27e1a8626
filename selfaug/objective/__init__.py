"""What is minimised: batches with roles, rows, terms, and the objective made of them."""

from selfaug.objective.batch import IGNORE, Role, TokenBatch
from selfaug.objective.objective import NLL, Losses, Objective
from selfaug.objective.terms import LogitAlignment, Term

__all__ = ["IGNORE", "NLL", "LogitAlignment", "Losses", "Objective", "Role", "Term", "TokenBatch"]
