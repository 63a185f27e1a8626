"""Every configuration file composes, and the hash of a run changes with its result and with nothing else."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import selfaug.conf
from selfaug.objective import Objective
from selfaug.run import build
from selfaug.run.identity import config_hash, register_resolvers

CONF = Path(selfaug.conf.__file__).parent
# Group options by group; base.yaml is what the others of its group have in common.
OPTIONS = sorted(
    (str(path.parent.relative_to(CONF)), path.stem) for path in CONF.rglob("*/*.yaml") if path.stem != "base"
)
# What an option leaves to the user.
NEEDED = {
    ("model", "local"): ("model.name=somewhere",),
    ("data", "jsonl"): ("data.path=mine.jsonl",),
    ("data", "crag"): ("data.path=crag.jsonl.bz2",),
}


@pytest.fixture(autouse=True)
def hydra():
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides: str) -> DictConfig:
    return compose("train", overrides=list(overrides))


def chosen(group: str, name: str) -> DictConfig:
    return composed(f"{group}={name}", *NEEDED.get((group, name), ()))


def names(group: str) -> list[str]:
    return [name for g, name in OPTIONS if g == group]


def test_all_groups_are_covered():
    assert {"model", "data", "method", "alignment", "trainer", "logger", "experiment", "debug"} <= {
        g for g, _ in OPTIONS
    }
    assert len(OPTIONS) >= 30


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=["-".join(option) for option in OPTIONS])
def test_every_option_composes(group: str, name: str):
    config = chosen(group, name)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert config.run_name.endswith(config_hash(config))


@pytest.mark.parametrize("alignment", names("alignment"))
@pytest.mark.parametrize("method", names("method"))
def test_every_method_instantiates(method: str, alignment: str):
    config = composed(f"method={method}", f"alignment={alignment}")
    objective = build.objective(config)
    assert isinstance(objective, Objective)
    assert objective.names[0] == "nll"
    assert set(objective.terms) == set(config.method.terms)


@pytest.mark.parametrize("name", names("adapter"))
def test_every_adapter_instantiates(name: str):
    assert instantiate(composed(f"adapter={name}").adapter, _convert_="all").r == 16


@pytest.mark.parametrize(
    "override",
    [
        "paths.runs_dir=/elsewhere", "logger=wandb", "logger=tensorboard", "progress=false", "tags=[a,b]",
        "data.num_workers=3", "force=true", "ckpt_path=null", "callbacks.checkpoint_every_n_steps=3", "debug=traceback",
        "method=selfaug", "alignment=input_logits", "seed=1",
    ],
)  # fmt: skip
def test_what_does_not_change_the_result_keeps_the_hash(override: str):
    assert config_hash(composed(override)) == config_hash(composed())


@pytest.mark.parametrize(
    "override",
    [
        "alignment.alpha=0.3", "alignment=output_logits", "alignment.boundary=false", "alignment.official=true",
        "alignment.divergence=kl_tuned_base", "seed=2", "optimizer.lr=1e-4", "method=lora", "adapter.r=8",
        "data=rag_instruct", "data.batch_size=8", "data.limit_train=10", "data.prompt.max_tokens=512",
        "model=qwen2_5_7b", "model.dtype=float32", "trainer.max_epochs=2", "trainer.precision=32-true",
        "evaluation.rag.limit=10", "trainer=ddp", "debug=smoke",
    ],
)  # fmt: skip
def test_what_changes_the_result_changes_the_hash(override: str):
    assert config_hash(composed(override)) != config_hash(composed())


def test_hash_of_plain_lora_does_not_depend_on_the_unused_alpha():
    assert config_hash(composed("method=lora", "alignment.alpha=0.3")) == config_hash(composed("method=lora"))


def test_hash_survives_saving(tmp_path: Path):
    config = composed("alignment.alpha=0.3", "tags=[a]")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert config_hash(OmegaConf.load(tmp_path / "config.yaml")) == config_hash(config)
