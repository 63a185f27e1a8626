"""Finished benchmarks on disk: one JSON file each, with everything that an audit of the score needs.

A file appears whole, so that a killed evaluation goes on with the benchmark in which it was stopped. It is used again
only for the same model, settings, template and versions.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from selfaug.evaluation.retention.harness import Item, Scores
from selfaug.files import write_json

log = logging.getLogger(__name__)


class Store:
    """Scores of one model in `directory`. `model`: a digest of all that decides what it computes."""

    def __init__(self, directory: Path, model: str):
        self.directory, self.model = directory, model

    def get(self, name: str, about: dict[str, Any]) -> Scores | None:
        """The scores, or None where there are none, or only of another model or other settings."""
        path = self.directory / f"{name}.json"
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
        write_json(self.directory / f"{name}.json", {"model": self.model, **dataclasses.asdict(scores)})
