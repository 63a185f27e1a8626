"""Rows are named by what tells them apart, and plain LoRA is one row however it was asked for."""

from typing import Any

import pytest

from benchmarks.report import POSITIONS, made_up
from selfaug.reporting.labels import PLAIN, alpha_of, baseline_key, is_plain, position_of, row_key, row_labels


def config(name: str = "selfaug", term: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    terms = {} if term is None else {"kl": term}
    return {"method": {"name": name, "terms": terms}, "adapter": {"r": 16}, **rest}


def mixed(ratio: float) -> dict[str, Any]:
    return {"mixture": {"other": {"ratio": ratio, "source": {"_target_": "a.B", "seed": 0}}}, "batch_counts": "all"}


KL = {"_target_": "selfaug.objective.LogitAlignment", "alpha": 0.5, "position": "input_logits", "mask_target": False}


@pytest.mark.parametrize(
    "plain",
    [
        config("lora"),
        config("selfaug", {"position": "none"}),
        config("selfaug", KL | {"alpha": 0}),
        config("sa_sft", data=mixed(0)),
        config("selfaug_plus", KL | {"alpha": 0}, data=mixed(0.0)),
        config("selfaug", KL | {"alpha": 0.0, "schedule": None}),
        config("selfaug", KL | {"alpha": 0, "schedule": {"_target_": "selfaug.objective.schedules.Constant"}}),
    ],
)
def test_plain_lora_however_it_was_asked_for(plain):
    assert is_plain(plain)
    assert alpha_of(plain) == 0
    assert position_of(plain) == "none"
    assert row_key(plain) == row_key(config("lora"))
    assert row_labels([plain, config(term=KL)]) == [PLAIN, "selfaug, alpha=0.5"]


def test_results_of_evaluate_are_seeds_of_one_row():
    runs = [config(term=KL, target=f"runs/selfaug-s{seed}-abc", seed=seed) for seed in (1, 2)]
    assert row_key(runs[0]) == row_key(runs[1]) == row_key(config(term=KL))
    # Of an adapter from elsewhere nothing but its place is known.
    assert row_key({"target": "one"}) != row_key({"target": "two"})


def test_settings_that_change_together_are_all_named():
    def dialogues(**sampling: float) -> dict[str, Any]:
        source = {"_target_": "a.B", **sampling}
        return config("sa_sft", data={"mixture": {"own": {"ratio": 1, "source": source}}})

    found = row_labels([dialogues(temperature=0.7, top_p=0.9), dialogues(temperature=1, top_p=1)])
    assert found == ["temperature=0.7, top_p=0.9", "temperature=1, top_p=1"]
    names = ("a", "b", "c", "d")
    found = row_labels([dialogues(**dict.fromkeys(names, 0)), dialogues(**dict.fromkeys(names, 1))])
    assert found == ["a=0 (+3)", "a=1 (+3)"]


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"method": "x"},
        config(term=KL),
        config("lora", KL),
        config("magpie"),
        config("lora", data=mixed(0.5)),
        # No term that adds anything, but not all tokens count alike, or others are learned.
        {"method": {"name": "asft", "terms": {"kl": KL | {"alpha": 0}}, "weights": {"_target_": "a.DFT"}}},
        {"method": {"name": "stm", "terms": {}, "learn": {"_target_": "a.B"}}, "data": mixed(0)},
        {"method": {"name": "lora", "terms": {}}, "data": {"rewrite": {"instruction": "x"}}},
        config("selfaug", KL | {"alpha": 0}, data=mixed(0.5)),
        config(term=KL | {"alpha": 0, "schedule": {"_target_": "selfaug.objective.schedules.Linear", "end": 1.0}}),
        {"method": {"name": "selfaug", "terms": {"a": KL | {"alpha": 0}, "b": KL}}},
        {"method": {"name": "selfaug", "terms": [KL]}},
    ],
)
def test_everything_else_is_not(other):
    assert not is_plain(other)


def test_a_run_is_compared_with_plain_lora_of_its_own_settings():
    small, large = config("lora", adapter={"r": 8}), config("lora", adapter={"r": 64})
    assert baseline_key(config(term=KL, adapter={"r": 8})) == baseline_key(small) != baseline_key(large)
    assert baseline_key(config(term=KL, seed=3)) == baseline_key(config("lora", seed=1, paths={"runs_dir": "x"}))


def test_rewritten_targets_belong_to_the_method():
    plain, sdft = config("lora", data={"rewrite": None}), config("sdft", data={"rewrite": {"instruction": "x"}})
    assert baseline_key(sdft) == baseline_key(plain)
    assert row_labels([plain, config(term=KL, data={"rewrite": None}), sdft])[1:] == [
        "selfaug", "sdft",
    ]  # fmt: skip


def test_methods_go_by_their_names_and_say_their_alpha_where_it_tells_them_apart():
    dft = {**config(), "method": {"terms": {"kl": KL}, "name": "dft"}}
    rows = [config(term=KL), config(term=KL | {"alpha": 0.3}), dft, config("lora")]
    assert row_labels(rows) == ["selfaug, alpha=0.5", "selfaug, alpha=0.3", "dft", PLAIN]
    assert row_labels(rows[1:]) == ["selfaug", "dft", PLAIN]


def test_names_are_cut_only_where_they_stay_different():
    assert row_labels([config("keep0.5", KL), config("drop0.5", KL), config("lora")])[:2] == ["keep0.5", "drop0.5"]
    here, there = ({"_target_": f"{module}.Keep", "r": 16} for module in ("a", "b"))
    assert row_labels([config(term=KL, adapter=here), config(term=KL, adapter=there)]) == ["a.Keep", "b.Keep"]
    assert row_labels([config(term=KL, adapter=here), config(term=KL, adapter={"_target_": "a.Leave", "r": 16})]) == [
        "Keep", "Leave",
    ]  # fmt: skip


def test_what_is_as_in_plain_lora_is_not_said():
    plain = config("lora", adapter={"_target_": "peft.LoraConfig", "r": 16}, optimizer={"lr": 5e-4})
    full = {"_target_": "selfaug.model.full.FullFineTuning", "freeze": "head"}
    sft = config("sft", adapter=full, optimizer={"lr": 1e-5})
    rows = [plain, plain | config(term=KL, adapter=plain["adapter"], optimizer=plain["optimizer"]), sft]
    assert row_labels(rows) == [PLAIN, "selfaug", "sft, FullFineTuning, lr=1e-05"]
    assert row_labels([plain, sft]) == [PLAIN, "sft"]
    half = sft | {"adapter": full | {"freeze": "0-50%"}}
    assert row_labels([*rows, half])[2:] == [
        "sft, FullFineTuning, freeze=head, lr=1e-05", "sft, FullFineTuning, freeze=0-50%, lr=1e-05",
    ]  # fmt: skip
    assert row_labels([*rows[:2], rows[1] | {"optimizer": {"lr": 1e-4}}])[1:] == ["lr=0.0005", "lr=0.0001"]


def test_mixtures_are_compared_with_plain_lora_and_named_by_their_ratio():
    plain, runs = config("lora", data={"mixture": {}}), [config("sa_sft", data=mixed(r)) for r in (0.5, 1.0)]
    assert {baseline_key(run) for run in runs} == {baseline_key(plain)}
    assert row_labels([plain, *runs]) == [PLAIN, "ratio=0.5", "ratio=1.0"]


def test_positions_are_named_by_the_position_alone():
    hidden = {"_target_": "selfaug.objective.HiddenAlignment", "alpha": 0.5, "tokens": "input", "distance": "mse"}
    terms = [KL, KL | {"position": "output_logits"}, KL | {"position": "output_logits", "mask_target": True}]
    terms += [hidden | {"position": "attention_q"}, hidden | {"position": "all_layers"}]
    assert row_labels([config("lora"), *(config(term=term) for term in terms)]) == [
        PLAIN,
        "position=input_logits",
        "position=output_logits, mask_target=false",
        "position=output_logits, mask_target=true",
        "position=attention_q",
        "position=all_layers",
    ]


def test_grids_name_every_setting_that_differs():
    grid = [config(term=KL | {"alpha": a}, adapter={"r": r}) for a in (0.1, 1.0) for r in (8, 64)]
    assert row_labels(grid) == ["alpha=0.1, r=8", "alpha=0.1, r=64", "alpha=1.0, r=8", "alpha=1.0, r=64"]
    ranks = [config("lora", adapter={"r": 8}), config("lora", adapter={"r": 64}), *grid[:2]]
    assert row_labels(ranks) == [f"{PLAIN}, r=8", f"{PLAIN}, r=64", "r=8", "r=64"]


def test_settings_of_equal_effect_on_the_label_are_told_apart():
    """Directions by boundary by official: nothing of it is named position or alpha."""
    terms = [KL | {"divergence": d, "boundary": b} for d in ("kl_base_tuned", "kl_tuned_base") for b in (True, False)]
    labels = row_labels([config(term=term) for term in terms])
    assert len(set(labels)) == 4
    assert all("divergence=" in label and "boundary=" in label and "_target_" not in label for label in labels)


def test_labels_of_a_whole_sweep_are_different():
    runs = [made_up(position, alpha).config for position in POSITIONS for alpha in (0.1, 1.0)]
    assert len(set(row_labels(runs))) == len(runs)
    assert row_labels([]) == []


def test_several_terms_have_no_one_alpha():
    two = {"method": {"name": "selfaug", "terms": {"a": KL, "b": KL}}}
    assert alpha_of(two) is None
    assert position_of(two) is None
    assert alpha_of(config(term=KL | {"alpha": "adaptive"})) is None


def test_runs_whose_alpha_follows_other_probes_are_no_seeds_of_one_row():
    def run(every: int, signal: str) -> dict[str, Any]:
        config = made_up().config
        config["method"]["terms"]["kl"]["schedule"] = {"_target_": "x.KLTarget", "signal": signal}
        return config | {"callbacks": {"retention_probe": {"every_n_steps": every}, "checkpoint_every_n_steps": every}}

    assert row_key(run(5, "kl")) == row_key(run(20, "kl"))
    assert row_key(run(5, "drift")) != row_key(run(20, "drift"))
    assert "every_n_steps" in row_labels([run(5, "drift"), run(20, "drift")])[0]
