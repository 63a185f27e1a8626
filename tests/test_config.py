"""Every configuration file composes, and the hash of a run changes with its result and with nothing else."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, PeftConfig

import selfaug.conf
from selfaug.errors import UserError
from selfaug.model.full import FullFineTuning
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
    ("size", "paper"): ("data.path=crag.jsonl.bz2",),
    ("experiment", "model_scale"): ("data.path=crag.jsonl.bz2",),
    ("mixture", "jsonl"): ("data.mixture.more.source.path=mine.jsonl",),
    ("method", "o_lora"): ("method.terms.o_lora.adapter=somewhere",),
}
# Groups that are added under a name of the user's.
ADDED = {"mixture": "+mixture@data.mixture.more"}


@pytest.fixture(autouse=True)
def hydra():
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@cache
def composed(*overrides: str) -> DictConfig:
    """Composing takes a third of a second, so every configuration is composed once, and may only be read."""
    config = compose("train", overrides=list(overrides))
    OmegaConf.set_readonly(config, True)
    return config


def chosen(group: str, name: str) -> DictConfig:
    return composed(f"{ADDED.get(group, group)}={name}", *NEEDED.get((group, name), ()))


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


# Every method, and every alignment with the methods that have one.
METHODS = [(method, "input_logits") for method in names("method")]
METHODS += [
    (method, alignment)
    for method in names("method")
    for alignment in names("alignment")
    if "${alignment}" in (CONF / "method" / f"{method}.yaml").read_text() and alignment != "input_logits"
]


@pytest.mark.parametrize(("method", "alignment"), METHODS)
def test_every_method_instantiates(method: str, alignment: str):
    config = composed(f"method={method}", f"alignment={alignment}", *NEEDED.get(("method", method), ()))
    if config.alignment.get("source") and config.alignment.get("official"):
        with pytest.raises(UserError, match="belongs to no data source"):
            build.objective(config)
        return
    objective = build.objective(config)
    assert isinstance(objective, Objective)
    assert objective.names[0] == "nll"
    terms = {name for name, term in config.method.terms.items() if term.get("position") != "none"}
    assert {name.replace("hidden", "kl") for name in (*objective.terms, *objective.parameter_terms)} == terms


@pytest.mark.parametrize("name", names("adapter"))
def test_every_adapter_instantiates(name: str):
    assert isinstance(instantiate(composed(f"adapter={name}").adapter, _convert_="all"), (PeftConfig, FullFineTuning))


def test_the_default_adapter_is_lora_of_rank_16():
    adapter = instantiate(composed().adapter, _convert_="all")
    assert isinstance(adapter, LoraConfig)
    assert adapter.r == 16


@pytest.mark.parametrize(
    "override",
    [
        "paths.runs_dir=/elsewhere", "logger=wandb", "logger=tensorboard", "progress=false", "tags=[a,b]",
        "data.num_workers=3", "force=true", "ckpt_path=null", "callbacks.checkpoint_every_n_steps=3", "debug=traceback",
        "method=selfaug", "alignment=input_logits", "seed=1", "self_dialogues=bait", "self_dialogues.turns=3",
        "data.batch_counts=task",
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
        "evaluation.rag.limit=10", "trainer=ddp", "debug=smoke", "method=sa_sft",
        "+mixture@data.mixture.more=alpaca_sample",
    ],
)  # fmt: skip
def test_what_changes_the_result_changes_the_hash(override: str):
    assert config_hash(composed(override)) != config_hash(composed())


def test_hash_of_plain_lora_does_not_depend_on_the_unused_alpha():
    assert config_hash(composed("method=lora", "alignment.alpha=0.3")) == config_hash(composed("method=lora"))


def test_no_alignment_is_one_run_whatever_its_settings():
    """So that a sweep over alignments and alphas trains plain LoRA once for each seed."""
    plain = config_hash(composed("alignment=none"))
    assert config_hash(composed("alignment=none", "alignment.alpha=0.3", "alignment.divergence=kl_tuned_base")) == plain
    assert config_hash(composed("alignment=none", "alignment/schedule=linear")) == plain
    assert config_hash(composed("alignment=none", "reference.cache=disk")) == plain
    assert config_hash(composed("alignment=none", "seed=2")) != plain
    assert config_hash(composed("alignment.alpha=0")) != plain


@pytest.mark.parametrize("schedule", names("alignment/schedule"))
@pytest.mark.parametrize("alignment", ["input_logits", "all_layers"])
def test_every_schedule_instantiates(alignment: str, schedule: str):
    config = composed(f"alignment={alignment}", f"alignment/schedule={schedule}")
    (term,) = build.objective(config).terms.values()
    assert term.schedule is not None
    assert term.schedule.alpha(0.5, 3, 10) >= 0


def test_terms_are_combined_freely():
    """As docs and README say: another alignment under a name of its own, with its own weight."""
    config = composed("+alignment@method.terms.output=target_masked_output", "method.terms.output.alpha=0.1")
    terms = build.objective(config).terms
    assert [(name, term.position, term.alpha) for name, term in terms.items()] == [
        ("kl", "input_logits", 0.5),
        ("output", "output_logits", 0.1),
    ]


@pytest.mark.parametrize("method", ["sa_sft", "magpie", "self_kl", "selfaug_plus"])
def test_settings_of_self_dialogues_change_the_hash_where_they_are_used(method: str):
    plain = config_hash(composed(f"method={method}"))
    for change in ("self_dialogues.turns=2", "self_dialogues=bait", "method.ratio=0.3", "self_dialogues.seed=1"):
        config = composed(f"method={method}", change)
        assert config_hash(config) != plain
        assert config.data.mixture.self_dialogues.ratio == config.method.ratio


def test_what_the_batch_counts_is_part_of_a_mixture():
    assert config_hash(composed("method=sa_sft", "data.batch_counts=task")) != config_hash(composed("method=sa_sft"))


def test_a_source_of_a_method_can_be_another():
    config = composed("method=replay", "mixture@data.mixture.replay=ultrachat", "method.ratio=0.5")
    assert config.data.mixture.replay.source.repo == "HuggingFaceH4/ultrachat_200k"
    assert config.data.mixture.replay.ratio == 0.5
    assert not composed("method=replay_kl", "mixture@data.mixture.replay=ultrachat").data.mixture.replay.nll


def test_magpie_samples_as_magpie_does_unless_told_otherwise():
    source = composed("method=magpie").data.mixture.self_dialogues.source
    assert (source.temperature, source.top_p, source.answer_temperature) == (0.7, 1.0, 0.0)
    assert composed("method=magpie", "self_dialogues=bait").data.mixture.self_dialogues.source.recipe == "bait"
    assert composed("method=sa_sft").data.mixture.self_dialogues.source.answer_top_p == 0.9


# ---- methods that choose options of other groups and set values -----------------------------------------------------


FULL = "selfaug.model.full.FullFineTuning"


@pytest.mark.parametrize("method", ["sft", "freeze"])
def test_a_method_brings_its_adapter_and_learning_rate(method: str):
    config = composed(f"method={method}")
    assert (config.adapter._target_, config.optimizer.lr) == (FULL, 1e-5)
    assert config.method.name == method
    assert config.run_name.startswith(f"{method}-")
    assert bool(config.adapter.freeze) == (method == "freeze")
    assert composed().optimizer.lr == 5e-4


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_wins_over_a_method(order: int):
    overrides = ["method=sft", "optimizer.lr=3e-5", "adapter=lora", "optimizer.weight_decay=0"][::order]
    config = composed(*overrides)
    assert (config.adapter._target_, config.optimizer.lr, config.optimizer.weight_decay) == ("peft.LoraConfig", 3e-5, 0)
    assert composed("method=freeze", "adapter.freeze=[0-14]").adapter.freeze == ["0-14"]


@pytest.mark.parametrize("experiment", ["ablation_alpha", "lora_rank", "demo"])
def test_a_method_within_an_experiment(experiment: str):
    """As a sweep over methods composes each of its jobs; what the experiment sets (the size) stays."""
    jobs = {method: composed(f"experiment={experiment}", f"method={method}") for method in ("lora", "sft", "selfaug")}
    assert [job.method.name for job in jobs.values()] == ["lora", "sft", "selfaug"]
    assert jobs["sft"].optimizer.lr == 1e-5
    assert jobs["sft"].adapter._target_ == FULL
    assert jobs["selfaug"].optimizer.lr == 5e-4
    assert len({job.data.batch_size for job in jobs.values()}) == 1


@pytest.mark.parametrize("size", ["lab", "paper"])
def test_the_sizes_leave_the_learning_rate_to_the_method(size: str):
    more = ["data.path=crag.jsonl.bz2"] if size == "paper" else []
    assert composed(f"size={size}", "method=sft", *more).optimizer.lr == 1e-5
    assert composed(f"size={size}", *more).optimizer.lr == 5e-4


# ---- experiments ---------------------------------------------------------------------------------------------------


def swept(name: str, *overrides: str) -> dict[str, list[str]]:
    """What the experiment sweeps over: setting to its values."""
    config = compose("train", overrides=[f"experiment={name}", *overrides], return_hydra_config=True)
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in config.hydra.sweeper.params.items()])
    return {one.key_or_group: [str(v) for v in one.sweep_string_iterator()] for one in parsed}


EXPERIMENTS = [name for name in names("experiment") if name != "demo"]


@pytest.mark.parametrize("size", ["lab", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_of_every_experiment_is_a_run(name: str, size: str):
    """Each value of each sweep composes and passes the checks that a run starts with; at the size of the paper, which
    sets nothing that a row does, the first and the last."""
    more = [f"size={size}", *(["data.path=crag.jsonl.bz2"] if size == "paper" else [])]
    if name == "context_length" and size == "paper":
        more.append("data.context_tokens=2048")
    params = swept(name, *more)
    assert len(params["seed"]) >= 3
    others = [key for key in params if key != "seed"]
    for key in others:
        for value in params[key] if size == "lab" else {params[key][0], params[key][-1]}:
            config = composed(f"experiment={name}", f"{key}={value}", *more)
            assert name in config.tags
            build.check(config)
            assert config.run_name.endswith(config_hash(config))


@pytest.mark.parametrize("size", ["size=lab", "size=paper", "experiment=ablation_alpha"])
def test_what_is_measured_is_up_to_the_command_line(size: str):
    more = ["data.path=crag.jsonl.bz2"] * (size == "size=paper")
    assert composed(size, "evaluation=standard", *more).evaluation.retention.benchmarks.ifeval is not None
    none = composed(size, "evaluation=none", *more)
    assert set(none.evaluation.values()) == {None}
    build.check(none)


def test_nothing_and_something_to_measure_contradict_each_other():
    with pytest.raises(UserError, match=r"^evaluation=none does not go with .* debug=smoke .* out\.$"):
        build.check(composed("evaluation=none", "debug=smoke"))


def test_smoke_leaves_no_benchmark():
    assert not any(composed("evaluation=standard", "debug=smoke").evaluation.retention.benchmarks.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_plain_lora_beside_it(name: str):
    params = swept(name, *NEEDED.get(("experiment", name), ()))
    plain = {"alignment": "none", "alignment.alpha": "0.0", "method": "lora", "method.ratio": "0.0"}
    assert any(value in params.get(name, []) for name, value in plain.items())


def test_the_positions_are_all_there():
    """The paper's Table 2, what it leaves out, and plain LoRA."""
    wanted = {*names("alignment")} - {name for name in names("alignment") if name.startswith(("sampled_", "input_"))}
    assert {*swept("ablation_position")["alignment"]} == (wanted | {"input_logits"}) - {"hidden_states"}


def test_the_probe_that_alpha_follows_is_part_of_the_name():
    often, probe = "callbacks.retention_probe.every_n_steps=5", "callbacks=retention_probe"
    assert config_hash(composed(probe, often)) == config_hash(composed())
    drift = ["alignment/schedule=kl_target", "alignment.schedule.signal=drift", probe]
    assert config_hash(composed(*drift, often)) != config_hash(composed(*drift))


def test_hash_survives_saving(tmp_path: Path):
    config = composed("alignment.alpha=0.3", "tags=[a]")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert config_hash(OmegaConf.load(tmp_path / "config.yaml")) == config_hash(config)


def test_sizes_leave_data_of_your_own_alone():
    """lab's short contexts are SQuAD's, and 75 tokens of answer CRAG's."""
    mine = composed("size=lab", "data=jsonl", "data.path=my.jsonl")
    assert "context_tokens" not in mine.data
    assert mine.data.limit_train == composed("size=lab").data.limit_train == 96
    assert composed("size=lab").data.source.context_tokens == 64
    with pytest.raises(ConfigCompositionException, match="context_tokens"):
        composed("experiment=context_length", "data=jsonl", "data.path=my.jsonl", "data.context_tokens=256")
    assert composed("size=paper", "data=rag_instruct").evaluation.rag.max_new_tokens == 256
    assert composed("size=paper", "data.path=crag.jsonl.bz2").evaluation.rag.max_new_tokens == 75


def test_whole_numbers_of_alpha_are_the_same_run():
    for one, other in (("0", "0.0"), ("1", "1.0")):
        assert config_hash(composed(f"alignment.alpha={one}")) == config_hash(composed(f"alignment.alpha={other}"))
