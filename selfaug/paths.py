"""Where selfaug keeps what it downloads and computes."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The cache directory: $SELFAUG_CACHE, or the user's cache directory. Not created here."""
    chosen = os.environ.get("SELFAUG_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("selfaug"))
