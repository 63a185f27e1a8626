"""Finished benchmarks on disk: one JSON file each, with everything that an audit of the score needs.

A file appears whole, so that a killed evaluation goes on with the benchmark in which it was stopped. It is used again
only for the same model, settings, template and versions.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from selfaug.evaluation.retention.harness import Item, Scores
from selfaug.files import write_json

log = logging.getLogger(__name__)


class Store:
    """Scores of one model in `directory`.

    model: a digest of all that decides what it computes. shared: many runs use it, with settings of their own, so that
    each of these has a file.
    """

    def __init__(self, directory: Path, model: str, shared: bool = False):
        self.directory, self.model, self.shared = directory, model, shared

    def _path(self, name: str, about: dict[str, Any]) -> Path:
        if not self.shared:
            return self.directory / f"{name}.json"
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        return self.directory / f"{name}-{digest}.json"

    def get(self, name: str, about: dict[str, Any]) -> Scores | None:
        """The scores, or None where there are none, or only of another model or other settings."""
        path = self._path(name, about)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["model"] != self.model or content["about"] != json.loads(json.dumps(about)):
                return None
            items = [Item(**item) for item in content["items"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): the benchmark is run again", path, str(error).split("\n")[0])
            return None
        return Scores(content["benchmark"], content["about"], items, content["seconds"])

    def put(self, name: str, scores: Scores) -> None:
        write_json(self._path(name, scores.about), {"model": self.model, **dataclasses.asdict(scores)})
