"""From the configuration to objects. The only place, beside the entry points, that knows both."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from selfaug.data.datamodule import RagDataModule
from selfaug.data.mixture import MixtureSource, check_source
from selfaug.data.prompt import PromptConfig
from selfaug.data.rewriting import RewriteConfig, RewrittenSource
from selfaug.data.schema import Source
from selfaug.data.sources.self_dialogues import SelfDialogues
from selfaug.data.text import hash_sources
from selfaug.errors import UserError
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import verify_decoder, verify_packing
from selfaug.model.entries import DiskEntries, MemoryEntries
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.model.full import FullFineTuning
from selfaug.model.load import add_adapter, load_base, load_tokenizer, recompute_activations
from selfaug.model.reference import AdaptersOff, Reference, check_runs
from selfaug.model.shard import shard
from selfaug.module import OptimizerConfig, SelfAugModule
from selfaug.objective import TASK, Objective
from selfaug.objective.alphas import Alphas
from selfaug.objective.preparation import Prepares
from selfaug.paths import cache_dir
from selfaug.run import method
from selfaug.run.identity import caches_reference
from selfaug.run.machine import room
from selfaug.run.make import call, make, plain
from selfaug.self_dialogues.settings import Settings
from selfaug.self_dialogues.store import DialogueStore, Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """What the trainer computes in. `name` is Lightning's; `mixed` says that autocast rounds products to bfloat16."""

    name: str
    mixed: bool

    def autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.mixed)


def precision(config: DictConfig) -> Precision:
    """trainer.precision, with `auto` decided: bf16-mixed where the processor has bfloat16 products, else 32-true."""
    name = str(config.trainer.precision)
    if name == "auto":
        name = "bf16-mixed" if _has_bf16() else "32-true"
    if name not in ("bf16-mixed", "32-true", "bf16-true"):
        raise UserError(f"trainer.precision={name} is not supported: set it to auto, bf16-mixed, bf16-true or 32-true.")
    return Precision(name, mixed=name == "bf16-mixed")


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpu = getattr(torch, "cpu", None)
    return any(getattr(cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


# Lightning's settings that would count micro-batches or cut epochs behind the back of our own.
_NOT_FOR_THE_TRAINER = {
    "check_val_every_n_epoch": "trainer.val_check_interval",
    "accumulate_grad_batches": "data.batch_size and data.micro_batch_tokens",
    "gradient_clip_val": "optimizer.max_grad_norm",
    "limit_train_batches": "data.limit_train or trainer.max_steps",
    "overfit_batches": "data.limit_train",
}


_HIGH_FOR_ALL_WEIGHTS = 1e-4
_MAY_BE_NULL = ("adapter.r", "data.limit_train", "data.micro_batch_size", "data.micro_batch_tokens")


def check(config: DictConfig) -> None:
    """Refuse what can be refused at once, before data and model are loaded."""
    if config.evaluation.get("rag") and "tokens_per_batch" not in config.evaluation:
        raise UserError(
            "evaluation=none does not go with settings of evaluation.rag, of which debug=smoke has some: leave one of "
            "the two out."
        )
    for name, least, most in (
        ("seed", 0, 2**32 - 1),
        ("trainer.max_epochs", 1, None),
        ("evaluation.tokens_per_batch", 1, None),
        ("evaluation.rag.max_new_tokens", 1, None),
        ("data.batch_size", 1, None),
        ("data.micro_batch_size", 1, None),
        ("data.micro_batch_tokens", 1, None),
        ("adapter.r", 1, None),
        ("data.limit_train", 1, None),
    ):
        value = OmegaConf.select(config, name)
        if value is None and (name in _MAY_BE_NULL or (name.startswith("evaluation.") and not config.evaluation.rag)):
            continue
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            raise UserError(
                f"{name}={value} is not allowed: set it to a whole number, at least {least}"
                + (f" and at most {most}." if most is not None else ".")
            )
    for name, instead in _NOT_FOR_THE_TRAINER.items():
        if name in config.trainer:
            raise UserError(f"trainer.{name} is not supported: set {instead} instead.")
    mixture(config)
    if config.data.get("rewrite"):
        call(RewriteConfig, "data", **plain(config.data.rewrite))
    preparations(config, objective(config))
    call(OptimizerConfig, "optimizer", **plain(config.optimizer))
    _check_learning_rate(config)
    precision(config)
    devices(config)


def _check_learning_rate(config: DictConfig) -> None:
    full = str(config.adapter.get("_target_")).endswith(f".{FullFineTuning.__name__}")
    if full and config.optimizer.lr > _HIGH_FOR_ALL_WEIGHTS:
        log.warning(
            "optimizer.lr=%g is of the size that adapters are trained with: where the weights themselves train, 1e-5 "
            "is usual (method=sft sets it)", config.optimizer.lr,
        )  # fmt: skip


def data(config: DictConfig) -> RagDataModule:
    """The data module; nothing is read or tokenised before its first use."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    node = plain(config.data)
    prompt = call(PromptConfig, "data/prompt", **node.pop("prompt"))
    source = make(node.pop("source"), "data")
    if rewrite := node.pop("rewrite", None):
        source = _rewritten(config, source, call(RewriteConfig, "data", **rewrite), prompt)
    node["mixture"] = mixture(config)
    for shorthand in ("name", "path", "context_tokens", "answer_tokens"):  # they only feed other settings
        node.pop(shorthand, None)
    return call(
        RagDataModule, "data", source=source, tokenizer=tokenizer, prompt=prompt, seed=config.seed,
        progress=config.progress, **node,
    )  # fmt: skip


def _rewritten(config: DictConfig, source: Source, rewrite: RewriteConfig, prompt: PromptConfig) -> Source:
    from selfaug.run.rewriting import ModelRewriter  # which builds a model

    return RewrittenSource(source, ModelRewriter(config, rewrite, prompt))


def mixture(config: DictConfig) -> dict[str, MixtureSource]:
    """The further data sources by name; nothing is read, and no self-dialogue written, before its first use."""
    found = {}
    for name, node in (config.data.get("mixture") or {}).items():
        settings = plain(node)
        settings.pop("source", None)
        # The node itself, whose errors name the whole setting.
        source = make(node.get("source") or {}, "mixture")
        if isinstance(source, SelfDialogues):
            source.writer = partial(_written, config)
        found[str(name)] = call(MixtureSource, "mixture", source=source, **settings)
        check_source(str(name), found[str(name)])
    return found


def _written(config: DictConfig, settings: Settings, wanted: Wanted) -> DialogueStore:
    from selfaug.run.self_dialogues import written  # which builds a model

    return written(config, settings, wanted)


def base_model(config: DictConfig, *, masters: bool = False) -> torch.nn.Module:
    """The frozen base model in the dtype that the trainer's precision asks for.

    masters: its own weights are to train, so that under mixed precision all of them are kept in float32.
    """
    return load_base(
        config.model.name,
        dtype=config.model.dtype if precision(config).name != "bf16-true" else "bfloat16",
        mixed=precision(config).mixed and not masters,
        revision=config.model.revision,
        attn_implementation=config.model.attn_implementation,
    )


def tuned_model(config: DictConfig) -> torch.nn.Module:
    """The model that trains: the base model with a fresh adapter, or with (some of) its own weights trainable."""
    wanted = make(config.adapter, "adapter")
    if isinstance(wanted, FullFineTuning):
        return wanted.apply(base_model(config, masters=True))
    model = add_adapter(base_model(config), wanted)
    check_runs(model)
    return model


def objective(config: DictConfig) -> Objective:
    """NLL, how its tokens are weighted, and the terms of the method."""
    terms = method.terms(config)
    _check_schedules(config, terms)
    if any(getattr(term, "official", False) for term in terms.values()):
        for without, name, off in (
            (caches_reference(config), "the reference cache", "reference.cache=off"),
            (config.data.packing, "a packed row", "data.packing=false"),
        ):
            if without:
                raise UserError(
                    f"alignment.official=true counts padding, which {name} does not keep: set {off} with it."
                )
    sources = (TASK, *(config.data.get("mixture") or {}))
    found = Objective(terms, reference(config), method.weights(config), sources)  # which refuses unknown sources
    _check_sources_are_used(config, terms)
    return found


def _check_sources_are_used(config: DictConfig, terms: dict[str, Any]) -> None:
    wanted = {getattr(term, "source", None) for term in terms.values() if not hasattr(term, "penalty")}
    for name, node in (config.data.get("mixture") or {}).items():
        if node.get("nll") is False and node.get("ratio") != 0 and not wanted & {None, name}:
            raise UserError(
                f"data.mixture.{name}.nll=false, and no term of the method is for it, so that nothing would come of "
                f"{name}: add a term with source: {name} (method=self_kl has one), or set nll=true."
            )


def preparations(config: DictConfig, goal: Objective) -> dict[str, Prepares]:
    """What of the method is prepared before the first step, by name: method.learn, and weights and terms that ask."""
    parts: dict[str, Any] = {**goal.terms, **goal.parameter_terms}
    parts |= {"weights": goal.weights, "learn": method.learn(config)}
    return {name: part for name, part in parts.items() if hasattr(part, "prepare")}


def with_method_texts(config: DictConfig, fingerprint: str) -> str:
    """The data's fingerprint, together with the content of the files that terms read (EWC's text, O-LoRA's earlier
    adapter), where they do."""
    files = {}
    for name, term in method.term_nodes(config).items():
        text = term.get("text")
        if OmegaConf.is_dict(text) and text.get("path"):
            files[name] = Path(str(text.path)).expanduser()
        elif adapter := term.get("adapter"):
            files[name] = Path(str(adapter)).expanduser() / "adapter_model.safetensors"
    found = {name: file for name, file in files.items() if file.is_file()}  # one that is not there is named later
    return hash_sources("method", 1, {"data": fingerprint}, found) if found else fingerprint


def _check_schedules(config: DictConfig, terms: dict[str, Any]) -> None:
    alphas = Alphas({name: term for name, term in terms.items() if not hasattr(term, "penalty")})
    for schedule in alphas.schedules.values():
        if getattr(schedule, "signal", None) == "drift" and not config.callbacks.get("retention_probe"):
            raise UserError(
                "alignment.schedule.signal=drift needs the drift to be measured meanwhile: set "
                "callbacks=retention_probe with it."
            )
    balanced = any(alphas.wants_gradients(step) for step in range(100))
    if balanced and len(terms) > 1:
        raise UserError(
            "alignment/schedule=gradient_balance balances the NLL with one term, and the method has several: use "
            "another schedule."
        )
    if balanced and _sharded(config):
        raise UserError(
            "alignment/schedule=gradient_balance needs whole gradients, which trainer=fsdp does not keep: use another "
            "schedule, or trainer=ddp."
        )


def _sharded(config: DictConfig) -> bool:
    return "ModelParallel" in str(OmegaConf.select(config, "trainer.strategy._target_"))


def reference(config: DictConfig) -> Reference:
    """Where the base model's states come from: adapters off, a cache of that, or a second model."""
    wanted = config.reference
    if wanted.frozen_copy and caches_reference(config):
        raise UserError(
            f"reference.frozen_copy=true and reference.cache={wanted.cache} both keep the base model: set one of them."
        )
    if wanted.frozen_copy:
        return FrozenCopy(lambda: base_model(config), wanted.device)
    if not caches_reference(config):
        return AdaptersOff()
    if wanted.cache == "memory":
        return CachedReference(MemoryEntries(lambda: room(torch.device("cpu")) or 0), wanted.limit_gb)
    if wanted.cache == "disk":
        directory = Path(wanted.directory).expanduser() if wanted.directory else cache_dir() / "reference"
        return CachedReference(DiskEntries(directory), wanted.limit_gb)
    raise UserError(f"reference.cache={wanted.cache} is unknown: set it to off, memory or disk.")


def module(config: DictConfig) -> SelfAugModule:
    """The model that trains and its objective. The adapter's initial weights depend on the seed alone."""
    L.seed_everything(config.seed, verbose=False)
    goal = objective(config)  # first: a wrong alpha should not have to wait for the model
    optimizer = call(OptimizerConfig, "optimizer", **plain(config.optimizer))
    model = tuned_model(config)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    if not needs_accelerator(model):
        with precision(config).autocast("cpu"):  # where the model still is
            verify(model, packing=config.data.packing)
    return SelfAugModule(model, goal, optimizer, seed=config.seed, shard=shard if _sharded(config) else None)


def verify(model: torch.nn.Module, packing: bool) -> None:
    """Raise UserError unless selfaug computes what the model itself would: logits, and examples packed together."""
    verify_decoder(model)
    if packing:
        verify_packing(model)


def needs_accelerator(model: Any) -> bool:
    """Whether its attention runs on no CPU: then it is verified where it trains (see VerifyModel)."""
    return "flash" in str(model.config._attn_implementation)


def devices(config: DictConfig) -> int:
    """How many processes train, on this node."""
    wanted = config.trainer.devices
    if wanted == "auto":
        return max(torch.cuda.device_count(), 1)
    if isinstance(wanted, (list, tuple)) or OmegaConf.is_list(wanted):
        return len(wanted)
    if not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"trainer.devices={wanted} is not allowed: set it to a number of processes, or to auto.")
    return wanted


def trainer(config: DictConfig, callbacks: Sequence[L.Callback], loggers: Sequence[Any], root: str) -> L.Trainer:
    """The Lightning trainer; every other key of `trainer` goes to it as it is. Our own callback saves checkpoints."""
    node = plain(config.trainer)
    # The weights are loaded in bfloat16 then. Lightning's plugin of that name would cast the batches as well, which
    # hold no floating-point numbers and are frozen.
    node["precision"] = "32-true" if precision(config).name == "bf16-true" else precision(config).name
    if not isinstance(node["devices"], list):  # a list names the devices
        node["devices"] = devices(config)
    if isinstance(node.get("strategy"), dict):
        node["strategy"] = make(config.trainer.strategy, "trainer")
    return call(
        L.Trainer, "trainer", callbacks=list(callbacks), logger=list(loggers), default_root_dir=root,
        enable_progress_bar=config.progress, use_distributed_sampler=False, enable_model_summary=False,
        enable_checkpointing=False, **node,
    )  # fmt: skip
