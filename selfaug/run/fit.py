"""The training stage of a run: from a claimed run directory to adapter/ (or model/) and fit.json."""

import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from peft import PeftModel
from torch.distributed.tensor import DTensor

from selfaug.callbacks.advice import Advice
from selfaug.callbacks.prepare import Prepare
from selfaug.callbacks.reference_fill import FillReference
from selfaug.callbacks.retention_probe import ProbeConfig, RetentionProbe
from selfaug.callbacks.saving import SaveCheckpoints, newest_checkpoint
from selfaug.callbacks.throughput import Throughput
from selfaug.callbacks.verify import VerifyModel
from selfaug.data.datamodule import RagDataModule
from selfaug.errors import UserError
from selfaug.files import write_json
from selfaug.model.cache import CachedReference
from selfaug.model.fingerprint import base_tensors
from selfaug.module import SelfAugModule
from selfaug.run import build
from selfaug.run.identity import RunDirectory
from selfaug.run.machine import reset_peak
from selfaug.run.make import call, plain
from selfaug.run.memory import MemoryPlan
from selfaug.run.score import chat_settings, drift_settings

log = logging.getLogger(__name__)

SIGTERM_EXIT = 128 + signal.SIGTERM  # what a shell reports for a process ended by SIGTERM


def fit(config: DictConfig, run: RunDirectory, data: RagDataModule, loggers: Sequence[Logger]) -> None:
    """Train in this process (as one of the processes, where there are several), then save what was trained."""
    reset_peak()
    module = build.module(config)
    throughput = Throughput()
    saving = SaveCheckpoints(run.checkpoints, every_n_steps=config.callbacks.checkpoint_every_n_steps)
    plan = MemoryPlan(data)
    # What writes metrics of a step comes before what saves its checkpoint.
    callbacks: list[Callback] = [plan, throughput, *watching(config, data, saving), saving]
    if build.needs_accelerator(module.model):
        callbacks.insert(0, VerifyModel(partial(build.verify, packing=config.data.packing)))
    fill = None
    if module.objective.terms and isinstance(module.objective.reference, CachedReference):
        fill = FillReference(module.objective.reference, data, config.progress)
        callbacks.append(fill)
    prepare = Prepare(
        build.preparations(config, module.objective), run.prepared, data, chat_settings(config), config.progress
    )
    if prepare.parts:
        callbacks.insert(-1 if fill is None else -2, prepare)  # before what saves: it may write metrics
    trainer = build.trainer(config, callbacks, loggers, str(run.path))
    checkpoint = _resume_from(config, run)
    if checkpoint is not None:
        prepare.check_resumable()
        log.info("resuming from %s", checkpoint)
    try:
        # Lightning's own loops and our state are plain Python and tensors, so nothing needs to be unpickled.
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(
            f"trainer.val_check_interval does not fit: {str(error).splitlines()[0].rstrip('.')}."
        ) from error
    except SIGTERMException:
        log.warning(
            "stopped by SIGTERM after step %d; its checkpoint is in %s, and the same command resumes from it",
            trainer.global_step,
            run.checkpoints,
        )
        sys.exit(SIGTERM_EXIT)
    except SystemExit:
        if trainer.interrupted:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    saving.keep_metrics(trainer)  # a run that resumes after its last step never starts to train
    save_tuned(module, run, data.tokenizer)
    if trainer.is_global_zero:
        write_json(
            run.path / "fit.json",
            {
                "seconds": throughput.seconds,
                "reference_seconds": fill.seconds if fill else None,  # before the first step, and not in `seconds`
                "prepare_seconds": prepare.seconds if prepare.parts else None,  # the same
                "tokens": throughput.tokens,
                "steps": trainer.global_step,
                "peak_bytes": throughput.peak,
                "memory_plan": plan.parts,
            },
        )
    trainer.strategy.barrier()
    if saving.stop_requested:  # too late for a checkpoint: the training is complete, only the scores are missing
        sys.exit(SIGTERM_EXIT)


def watching(config: DictConfig, data: RagDataModule, saving: SaveCheckpoints) -> list[Callback]:
    """The callbacks that measure forgetting meanwhile, and what they advise."""
    wanted = config.callbacks.get("retention_probe")
    if not wanted:
        return [Advice(lambda: None)]
    drift, words = drift_settings(config), chat_settings(config)
    probe = RetentionProbe(
        call(ProbeConfig, "callbacks/retention_probe", **plain(wanted)), drift, data.tokenizer, words,
        stopping=lambda: saving.stop_requested,
    )  # fmt: skip
    return [probe, Advice(lambda: max((v for k, v in probe.latest.items() if "drift" in k), default=None))]


def save_tuned(module: SelfAugModule, run: RunDirectory, tokenizer: Any) -> None:
    """The adapter as a PEFT folder, or, of a model without one, the whole model and its tokenizer as from_pretrained
    takes them: safetensors in the dtype of the training, whole or not at all. Every process calls it, the first one
    writes."""
    model: Any = module.model
    adapter = isinstance(model, PeftModel)
    directory = run.adapter if adapter else run.model
    # An adapter is what is not the base model's: also its buffers, and weights of it that do not train.
    left_out = {id(tensor) for tensor in base_tensors(model).values()} if adapter else set()
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in left_out:
            # Sharded parameters are gathered, which all processes take part in.
            state[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
    if not module.trainer.is_global_zero:
        return
    work = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(str(work), safe_serialization=True, state_dict=state)
    if adapter:
        (work / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        tokenizer.save_pretrained(str(work))
    shutil.rmtree(directory, ignore_errors=True)
    work.rename(directory)


def _resume_from(config: DictConfig, run: RunDirectory) -> str | None:
    """The checkpoint to go on from: the newest whole one of this run, before it has one a given one, or none."""
    wanted = config.ckpt_path
    if wanted is None:
        for made_before in (run.checkpoints, run.prepared):
            shutil.rmtree(made_before, ignore_errors=True)
        return None
    newest = newest_checkpoint(run.checkpoints)
    if wanted == "auto" or newest is not None:
        return None if newest is None else str(newest)
    if not Path(wanted).is_file():
        raise UserError(f"ckpt_path={wanted} does not exist: set it to a checkpoint, to auto, or to null.")
    return str(wanted)
