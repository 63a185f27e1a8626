"""Settings of PyTorch that are read from the environment, once, before its first tensor."""

import os

_SETTINGS = {
    # On CPUs torch keeps the kernels that it has compiled for a shape of batch, 20 MB of them, for so many shapes (1024
    # unless set); batches of text hardly ever have the same shape again.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
    # Tensors of 2 MB and more in huge pages: a step that allocates gigabytes does not stop for every 4 KB of them.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def tune() -> None:
    """Set them for this process and those it starts, where the user has not."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
