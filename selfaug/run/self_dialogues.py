"""Self-dialogues of the configured base model: where they lie, and how more are written."""

import logging
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from omegaconf import DictConfig

from selfaug.data.chat import ChatFormat
from selfaug.data.text import hash_sources
from selfaug.errors import UserError
from selfaug.evaluation.sampling import Sampled, sample
from selfaug.model.load import load_tokenizer, locate
from selfaug.paths import cache_dir
from selfaug.reporting.results import code_version
from selfaug.run import build
from selfaug.run.machine import free_unused
from selfaug.run.make import plain
from selfaug.run.score import device
from selfaug.self_dialogues.converse import Conversation
from selfaug.self_dialogues.settings import Settings
from selfaug.self_dialogues.store import DialogueStore, Wanted

log = logging.getLogger(__name__)

# What decides what a model in a folder writes; not its README.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def written(config: DictConfig, settings: Settings, wanted: Wanted, folder: Path | None = None) -> DialogueStore:
    """Where at least as many as `wanted` lie; what is missing is written, by one process while others wait.

    folder: None for the one in the cache that model and settings name.
    """
    identity = model_identity(config)
    fingerprint = settings.fingerprint(identity)
    store = DialogueStore(folder or cache_dir() / "dialogues" / f"{settings.recipe}-{fingerprint}")
    if store.about.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"out={store.folder} holds self-dialogues of another model or other settings: set out to another folder, "
            "or to null."
        )
    if not store.about and store.file.is_file():
        raise UserError(
            f"out={store.folder} holds a {store.file.name} that selfaug has not written: set out to another folder."
        )
    if store.holds(wanted):
        return store
    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(store.folder / ".lock"):
        if not store.holds(wanted):
            _write(config, settings, wanted, store, {"fingerprint": fingerprint, "identity": identity})
            free_unused()  # of the model: the training loads it again
    return store


def model_identity(config: DictConfig) -> str:
    """Names the base model as it would write here: a model folder by the content of its files, whatever its path."""
    place = Path(locate(config.model.name))
    if place.is_dir():
        files = sorted(file for pattern in _FILES for file in place.glob(pattern))
        model = _content(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    else:
        model = f"{config.model.name}@{config.model.revision}"
    return f"{model} {config.model.dtype} {build.precision(config).name}"


@cache
def _content(files: tuple[tuple[str, int, int], ...]) -> str:
    """A hash of files (path, size, time of change): a sweep in one process reads a model once."""
    return hash_sources("model", 1, {}, {Path(name).name: Path(name) for name, _, _ in files})


def _write(config: DictConfig, settings: Settings, wanted: Wanted, store: DialogueStore, named: dict[str, str]) -> None:
    log.info("the base model writes self-dialogues: %s", store.folder)
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    chat = ChatFormat(
        tokenizer, settings.chat_template, settings.template_arguments, setting="self_dialogues.chat_template"
    )
    seeds = settings.seeds() if settings.recipe == "prompts" else []
    where = device(config)
    store.begin(
        {
            **named,
            "settings": asdict(settings),
            "model": plain(config.model),
            "chat_template": chat.template,
            "seed_prompts": len(seeds),
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            "code": code_version(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    )
    model: Any = build.base_model(config).to(where)
    stops = sorted(chat.special_ids)  # whatever is markup ends a text

    def sampler(prompts: list[list[int]], uniforms: np.ndarray, temperature: float, top_p: float) -> list[Sampled]:
        return sample(model, tokenizer, prompts, uniforms, temperature=temperature, top_p=top_p, also_stop=stops)

    with build.precision(config).autocast(where.type):
        store.extend(Conversation(settings, chat, sampler, seeds), wanted, progress=config.progress)
