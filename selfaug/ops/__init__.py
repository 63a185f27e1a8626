"""Pure tensor functions: import torch and nothing else, know neither transformers nor Lightning."""

from selfaug.ops.linear_entropy import linear_entropy
from selfaug.ops.linear_kl import Divergence, linear_kl
from selfaug.ops.linear_nll import linear_nll
from selfaug.ops.linear_topk import linear_topk_entropy

__all__ = ["Divergence", "linear_entropy", "linear_kl", "linear_nll", "linear_topk_entropy"]
