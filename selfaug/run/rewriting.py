"""The base model of a run rewrites the targets of its training data; what it wrote is kept for all runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from selfaug.data.prompt import PromptBuilder, PromptConfig
from selfaug.data.rewriting import RewriteConfig
from selfaug.data.schema import Example
from selfaug.evaluation.generation import generate
from selfaug.files import write_json
from selfaug.model.load import load_tokenizer
from selfaug.paths import cache_dir
from selfaug.run import build
from selfaug.run.machine import free_unused
from selfaug.run.models import device
from selfaug.run.self_dialogues import model_identity


class ModelRewriter:
    """A Rewriter (selfaug/data/rewriting.py): greedy answers, a file for each block in the cache directory.

    The model is loaded when the first block is missing.
    """

    def __init__(self, config: DictConfig, rewrite: RewriteConfig, prompt: PromptConfig):
        self._run, self.config = config, rewrite
        self._prompt = replace(prompt, instruction=rewrite.instruction, on_too_long="drop")
        self._tokenizer = load_tokenizer(config.model.name, config.model.revision)
        self._model: Any = None

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        builder = PromptBuilder(self._tokenizer, self._prompt)
        own = self.config  # what is used of the answers is for RewrittenSource to say
        parts = [model_identity(self._run), builder.fingerprint(), own.instruction, own.request, own.max_new_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self, number: int, examples: Sequence[Example]) -> list[str]:
        # By its content too: the same settings serve several data sets.
        asked = hashlib.sha256(json.dumps([asdict(one) for one in examples]).encode()).hexdigest()[:12]
        folder = cache_dir() / "rewritten" / self._fingerprint[:12]
        path = folder / f"{number:05d}-{asked}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # runs that start together share the work
            if not path.is_file():
                write_json(path, self._write(examples))
        return _read(path)

    def _write(self, examples: Sequence[Example]) -> list[str]:
        where = device(self._run)
        if self._model is None:
            self._model = build.base_model(self._run).to(where)
        builder = PromptBuilder(self._tokenizer, self._prompt)
        shown = {
            one.example.id: one.input_ids[: one.prompt_length] for one in builder.build([*map(self._asking, examples)])
        }
        with build.precision(self._run).autocast(where.type):
            answers = generate(
                self._model, self._tokenizer, list(shown.values()), max_new_tokens=self.config.max_new_tokens,
                progress=self._run.progress, description="rewriting targets", also_stop=builder.chat.end_ids[-1:],
                if_cut="",
            )  # fmt: skip
        said = dict(zip(shown, answers, strict=True))
        return [said.get(one.id, "") for one in examples]

    def _asking(self, example: Example) -> Example:
        request = self.config.request.replace("{answer}", example.answers[0])
        return replace(example, question=f"{example.question}\n{request}")

    def close(self) -> None:
        if self._model is not None:
            self._model = None
            free_unused()  # the training loads it again


def _read(path: Path) -> list[str]:
    texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return texts
