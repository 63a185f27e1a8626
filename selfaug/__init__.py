"""selfaug: fine-tune language models on RAG without making them forget.

For people with their own training loop, `selfaug_loss` and `selfaug.ops.linear_kl` are all there is to know;
everything else runs through `python -m selfaug.train`.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["SelfAugLoss", "__version__", "selfaug_loss"]

if TYPE_CHECKING:
    from selfaug.loss import SelfAugLoss, selfaug_loss


def __getattr__(name: str):
    # Lazily, so that `python -m selfaug.assets` does not wait for torch.
    if name in ("selfaug_loss", "SelfAugLoss"):
        from selfaug import loss

        return getattr(loss, name)
    raise AttributeError(f"module 'selfaug' has no attribute {name!r}")
