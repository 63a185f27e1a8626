"""Where the reference cache keeps its tensors: on disk or in memory, by the model they are of and a name.

On disk an entry is one safetensors file that appears whole: it is written under another name and then renamed, so a
kill leaves either no entry or a good one, and several processes may write the same one. What happens to it later is
caught when a process uses it first: a checksum covers the values, their type and shape, the model and the name. An
entry that does not fit is not used; whoever asked computes it again and puts the new one in its place.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from selfaug.errors import UserError
from selfaug.model.fingerprint import tensor_bytes

log = logging.getLogger(__name__)

FORMAT = "1"  # raise it whenever the same name would mean other values
_STALE_SECONDS = 3600  # a temporary file so old belongs to nobody; writing one takes well under a second


class Entries(Protocol):
    """Tensors by model (its fingerprint) and name. `place`: in words, for messages."""

    place: str

    def get(self, model: str, name: str, length: int) -> Tensor | None:
        """The entry, on the CPU, not to be written to; None where there is none of `length` rows that can be used."""
        ...

    def put(self, model: str, name: str, values: Tensor) -> None: ...

    def free(self) -> int:
        """Bytes that there is room for."""
        ...


class MemoryEntries:
    """In this process; gone with it.

    Args:
        room: asks how many bytes this process can still have; None: what the machine has free.
    """

    place = "memory"

    def __init__(self, room: Callable[[], int] | None = None) -> None:
        self._entries: dict[tuple[str, str], Tensor] = {}
        self._room = room or (lambda: psutil.virtual_memory().available)

    def get(self, model: str, name: str, length: int) -> Tensor | None:
        return self._entries.get((model, name))

    def put(self, model: str, name: str, values: Tensor) -> None:
        self._entries[model, name] = values.detach().cpu().clone()

    def free(self) -> int:
        return self._room()


class DiskEntries:
    """DIRECTORY/model/first two letters of the name/name.safetensors."""

    def __init__(self, directory: Path):
        self.directory, self.place = directory, str(directory)
        self._verified: set[tuple[str, str]] = set()
        self._damaged: set[Path] = set()  # and said so

    def get(self, model: str, name: str, length: int) -> Tensor | None:
        path = self._path(model, name)
        try:
            with safe_open(path, "pt") as file:  # memory-mapped
                values: Tensor = file.get_tensor("values")
                metadata = file.metadata() or {}
            if (model, name) not in self._verified:
                if values.shape[:1] != (length,):
                    raise ValueError(f"it has shape {list(values.shape)}, not {length} rows")
                if metadata != _metadata(model, name, values):
                    raise ValueError("its checksum is not that of this entry")
                self._verified.add((model, name))
        except FileNotFoundError:
            return None
        except Exception as error:  # there is no telling what a damaged header makes the reader raise
            if path not in self._damaged:
                reason = str(error).split("\n")[0]
                log.warning("reference cache: %s is damaged or foreign (%s) and is computed again", path, reason)
            self._damaged.add(path)
            return None
        return values

    def put(self, model: str, name: str, values: Tensor) -> None:
        """Raises UserError where it cannot be written."""
        path = self._path(model, name)
        values = values.detach().cpu().contiguous()
        content = save({"values": values}, _metadata(model, name, values))
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"The reference cache cannot be written to {self.directory} ({error.strerror}): set "
                "reference.directory to a place that can be written and has room, or reference.cache=memory or off."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._verified.add((model, name))
        self._damaged.discard(path)

    def tidy(self, model: str) -> None:
        """Remove what killed processes have left of `model`."""
        for path in (self.directory / model).glob("*/.*.tmp"):
            with contextlib.suppress(OSError):  # another process may tidy too
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def free(self) -> int:
        existing = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def _path(self, model: str, name: str) -> Path:
        return self.directory / model / name[:2] / f"{name}.safetensors"


def _metadata(model: str, name: str, values: Tensor) -> dict[str, str]:
    """What is written beside the values: whose they are, and a checksum of that, of their type, shape and bytes."""
    described = {"format": FORMAT, "model": model, "name": name}
    checksum = hashlib.blake2b(json.dumps([described, str(values.dtype), list(values.shape)]).encode(), digest_size=16)
    checksum.update(tensor_bytes(values))
    # In one piece, because safetensors writes several in no fixed order: equal entries are equal files.
    return {"selfaug": json.dumps({**described, "checksum": checksum.hexdigest()})}
