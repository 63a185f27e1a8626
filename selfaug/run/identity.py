"""Who a run is: a hash of the part of its configuration that changes its result, and a directory named by it.

The same command therefore finds its own directory again: an unfinished run is resumed, a finished one is skipped, and
a sweep that crashed does only what is missing. Where the data itself has changed under the same configuration, the
run is refused rather than mixed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from selfaug.errors import UserError
from selfaug.files import write_json, write_text
from selfaug.run.ranks import rank

log = logging.getLogger(__name__)

# What does not change the result. `alignment` only feeds method.terms and `self_dialogues` only data.mixture, which are
# in the hash where they are used; of `reference` see config_hash.
IRRELEVANT = frozenset(
    {"alignment", "callbacks", "ckpt_path", "force", "hydra", "logger", "paths", "progress", "reference", "run_name",
     "self_dialogues", "tags"}
)  # fmt: skip
_IRRELEVANT_DATA = frozenset({"num_workers"})


def config_hash(config: DictConfig) -> str:
    """Ten hex digits that change whenever something that changes the result does."""
    # Key by key, because `run_name` and `hydra` refer back to this very hash.
    relevant: dict[str, Any] = {
        str(key): OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key]
        for key in config
        if key not in IRRELEVANT
    }
    if config.get("ckpt_path") not in ("auto", None):  # a start from elsewhere is another run
        relevant["ckpt_path"] = config.ckpt_path
    method: Any = relevant.get("method") or {}
    if method.get("terms"):  # a term that is left out has settings all the same
        kept = {name: term for name, term in _terms(method).items() if term.get("position") != "none"}
        # alpha=0 and alpha=0.0 are one run.
        kept = {name: {**term, "alpha": float(term["alpha"])} if _whole(term.get("alpha")) else term
                for name, term in kept.items()}  # fmt: skip
        relevant["method"] = {**method, "terms": kept}
    if caches_reference(config) and relevant.get("method", {}).get("terms"):
        # The cache computes each example alone, which rounds differently: a run is cached from its first to its last
        # step, or never. Where it is kept makes no difference.
        relevant["reference"] = "cached"
    if _follows_drift(relevant.get("method") or {}):  # alpha then depends on when and on what the probe measures
        probe = OmegaConf.select(config, "callbacks.retention_probe")
        relevant["probe"] = OmegaConf.to_container(probe, resolve=True) if OmegaConf.is_config(probe) else probe
    data: Any = relevant.get("data") or {}
    # Without a mixture the batch counts the same examples either way.
    unused = _IRRELEVANT_DATA if data.get("mixture") else _IRRELEVANT_DATA | {"mixture", "batch_counts"}
    if not data.get("rewrite"):
        unused |= {"rewrite"}
    relevant["data"] = {k: v for k, v in data.items() if k not in unused}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _follows_drift(method: dict[str, Any]) -> bool:
    schedules = [term.get("schedule") for term in _terms(method).values()]
    return any(isinstance(one, dict) and one.get("signal") == "drift" for one in schedules)


def _terms(method: dict[str, Any]) -> dict[str, Any]:
    """Whatever else stands among them is refused when the run starts."""
    found = method.get("terms")
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def caches_reference(config: DictConfig) -> bool:
    """Whether reference.cache is anything but off, which YAML also reads as false."""
    return OmegaConf.select(config, "reference.cache", default="off") not in ("off", False)


def register_resolvers() -> None:
    """Make ${config_hash:} known to OmegaConf. Idempotent."""
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True, use_cache=False)


class RunDirectory:
    """The files of one run.

    config.yaml      the resolved configuration
    run.json         what the run was started on (fingerprint of the data) and in (precision)
    metrics.csv      what was logged, by step
    prepared/        what the method has measured before its first step, if it does
    checkpoints/     for resuming; trainable weights, optimiser and loops only
    adapter/         the tuned PEFT adapter, written when training is complete
    model/           in its place, where the base weights themselves were trained: the whole model with its tokenizer
    fit.json         time, tokens and memory of the training
    evaluation/      base/ and tuned/: every prompt and answer of the general benchmarks, a file for each
    results.json     scores; the run is finished once it is there
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tuned(self) -> Path | None:
        """adapter/ or model/, whichever this run has written; None before that."""
        for folder, file in ((self.adapter, "adapter_config.json"), (self.model, "config.json")):
            if (folder / file).is_file():
                return folder
        return None

    @property
    def prepared(self) -> Path:
        return self.path / "prepared"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def finished(self) -> bool:
        return self.results.is_file()

    @property
    def fitted(self) -> bool:
        return (self.path / "fit.json").is_file() and self.tuned is not None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process works on this run: the same command twice, or two jobs of a sweep that are one run.
        The others wait. (Processes that train together are one: only the first of them asks.)"""
        if rank() > 0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("another process works on this run, waiting for it: %s", self.path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def claim(self, config: DictConfig, data_fingerprint: str, precision: str) -> None:
        """Write config.yaml and run.json, or check them against those of the run that is to be resumed.

        precision: what trainer.precision=auto has come to on this machine, which may not be the one it was started on.
        """
        started = self.path / "run.json"
        first = {"data_fingerprint": data_fingerprint, "precision": precision}
        if started.is_file():
            first |= json.loads(started.read_text())
        if first["data_fingerprint"] != data_fingerprint:
            raise UserError(
                f"The data has changed since the run in {self.path} was started: delete that directory, or set "
                "paths.runs_dir to another one."
            )
        if first["precision"] != precision and not self.finished:
            log.warning(
                "this run was started in %s and goes on in %s, so it is not quite what it would have been: set "
                "trainer.precision=%s to keep to one",
                first["precision"], precision, first["precision"],
            )  # fmt: skip
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_json(started, first)

    def discard_unstarted(self) -> None:
        """Remove the directory if nothing was started in it: a refused configuration leaves none behind."""
        made = {".hydra", "train.log", ".lock"}  # Hydra makes two, `alone` the third
        if rank() > 0 or not {path.name for path in self.path.glob("*")} <= made:
            return
        # Another process may wait to start it all the same, or just be doing so.
        with suppress(Timeout, OSError), FileLock(self.path / ".lock", timeout=0):
            shutil.rmtree(self.path)

    def read_fit(self) -> dict[str, Any]:
        return json.loads((self.path / "fit.json").read_text())
