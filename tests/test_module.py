"""The LightningModule: one optimiser step is the equation, whatever it is cut into, and nothing else trains."""

import copy
import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from selfaug.data.batching import StepDataset, StepLoader, StepSampler, collate
from selfaug.errors import UserError
from selfaug.loss import selfaug_loss
from selfaug.module import NonFiniteLoss, OptimizerConfig, SelfAugModule
from selfaug.objective import LogitAlignment, Objective, Role
from tests.tiny import VOCAB, tiny_model


class Record(Logger):
    """Keeps what is logged."""

    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *_, **__):
        pass

    def column(self, name):
        return [row[name] for row in self.rows if name in row]


def make_rows(n=8, *, longest=14, vocabulary=VOCAB):
    """n examples of different lengths: template, document, question, response."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(n):
        response = int(rng.integers(1, 6))
        prompt = int(rng.integers(4, longest - response))
        roles = [
            Role.TEMPLATE,
            *[Role.DOCUMENT] * (prompt - 3),
            Role.QUESTION,
            Role.TEMPLATE,
            *[Role.RESPONSE] * response,
        ]
        ids = rng.integers(1, vocabulary, len(roles)).tolist()
        rows.append({"id": f"e{i}", "input_ids": ids, "roles": [int(r) for r in roles], "length": len(ids)})
    return rows


def loader(rows, step_size=8, micro_batch_size=8, shuffle=False):
    sampler = StepSampler(
        np.array([row["length"] for row in rows]),
        step_size=step_size,
        micro_batch_size=micro_batch_size,
        shuffle=shuffle,
    )
    return StepLoader(StepDataset(rows, pad_id=0), sampler)


def trainer(record=None, **settings):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        logger=[record] if record else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 1, **settings},
    )


def selfaug(alpha=0.5, **settings):
    return Objective({"kl": LogitAlignment(alpha, **settings)})


def train(objective, rows, *, optimizer=None, lora=True, random_b=True, val=None, model=None, loading=None, **settings):
    """Train a tiny model. Returns (model, what was logged)."""
    record = Record()
    model = model if model is not None else tiny_model(lora=lora, random_b=random_b)
    module = SelfAugModule(model, objective, optimizer or OptimizerConfig(lr=5e-3))
    trainer(record, **settings).fit(module, loader(rows, **(loading or {})), None if val is None else loader(val))
    return model, record


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def whole(rows):
    """transformers' three tensors of all rows."""
    batch = collate(rows, 0)
    return batch.input_ids, batch.attention_mask, batch.labels


def test_training_learns_a_small_set_by_heart():
    model, record = train(
        selfaug(), make_rows(4), optimizer=OptimizerConfig(lr=4e-2, weight_decay=0), random_b=False, max_epochs=30
    )
    nll = record.column("train/nll")
    assert len(nll) == 30
    assert nll[-1] < nll[0] / 4
    assert record.column("train/kl")[0] == pytest.approx(0, abs=1e-6)
    assert record.column("train/kl")[-1] > 0
    assert record.column("step") == list(range(1, 31))
    assert model.training


@pytest.mark.parametrize("position", ["input_logits", "output_logits", "all_logits"])
def test_what_is_logged_is_selfaug_loss_on_the_same_step(position):
    rows = make_rows()
    _, record = train(selfaug(0.7, position=position), rows, loading={"micro_batch_size": 3})
    (logged,) = record.rows
    expected = selfaug_loss(tiny_model(lora=True), *whole(rows), alpha=0.7, position=position)
    assert logged["train/loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert logged["train/nll"] == pytest.approx(expected.nll.item(), rel=1e-5)
    assert logged["train/kl"] == pytest.approx(expected.kl.item(), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(logged["train/nll"] + 0.7 * logged["train/kl"], rel=1e-6)
    assert logged["train/rows_kl"] == expected.rows
    assert logged["train/rows_nll"] == sum(row["roles"].count(Role.RESPONSE) for row in rows)
    assert logged["train/tokens"] == sum(row["length"] for row in rows)
    assert logged["train/alpha"] == 0.7
    assert logged["step"] == 1
    assert logged["speed/tokens_per_s"] > 0


def test_two_terms_are_logged_by_name():
    objective = Objective({"kl": LogitAlignment(0.5), "out": LogitAlignment(0.25, "output_logits")})
    _, record = train(objective, make_rows())
    (logged,) = record.rows
    assert (logged["train/alpha_kl"], logged["train/alpha_out"]) == (0.5, 0.25)
    total = logged["train/nll"] + 0.5 * logged["train/kl"] + 0.25 * logged["train/out"]
    assert logged["train/loss"] == pytest.approx(total, rel=1e-6)


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def test_a_step_may_be_cut_into_micro_batches_in_any_way():
    rows = make_rows(24)
    # A large eps: Adam's first steps would otherwise be signs, where rounding counts as much as the gradient.
    optimizer = OptimizerConfig(lr=2e-2, eps=1e-2)
    runs = {
        micro: train(selfaug(), rows, optimizer=optimizer, loading={"micro_batch_size": micro, "shuffle": True})
        for micro in (8, 1, 4, 3)
    }
    expected, record = runs.pop(8)
    assert len(record.rows) == 3
    start = weights(tiny_model(lora=True))
    moved = max((value - start[name]).abs().max().item() for name, value in weights(expected).items())
    assert moved > 1e-3
    for model, other in runs.values():
        assert_close(weights(model), weights(expected))
        for name in ("train/loss", "train/nll", "train/kl"):
            assert other.column(name) == pytest.approx(record.column(name), rel=1e-5)
        for name in ("train/tokens", "train/rows_nll", "train/rows_kl", "train/lr"):
            assert other.column(name) == record.column(name)


# --- a loss that is not finite ------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_before_the_optimiser_steps():
    """Clipping would turn an infinite gradient into NaN weights, and the next checkpoint would keep them."""
    model = tiny_model(lora=True)
    before = weights(model)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLoss):
        train(selfaug(), make_rows(4, vocabulary=VOCAB), model=model, loading={"step_size": 4, "micro_batch_size": 2})
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_steps(value):
    rows = make_rows(12, vocabulary=VOCAB - 1)
    rows[9]["input_ids"][1] = VOCAB - 1
    model = tiny_model(lora=True)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[VOCAB - 1] = value
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen["weights"], seen["step"] = weights(module.model), trainer.global_step

    with pytest.raises(NonFiniteLoss) as caught:
        train(
            selfaug(), rows, model=model, loading={"step_size": 4, "micro_batch_size": 2}, callbacks=[Watch()],
            optimizer=OptimizerConfig(lr=5e-3, warmup_ratio=0),
        )  # fmt: skip
    assert seen["step"] == 2
    after = weights(model)
    assert all(torch.equal(after[n], w) for n, w in seen["weights"].items() if "embed" not in n)
    start = weights(tiny_model(lora=True))
    assert any(not torch.equal(after[n], w) for n, w in start.items() if "lora" in n)  # the first two steps were made
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert message.startswith("The loss of step 2 or its gradient is not finite (examples ")
    named = message.partition("(examples ")[2].partition(")")[0].split(", ")
    assert sorted(named) == ["e10", "e11", "e8", "e9"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"target_modules": ["o_proj"]}, r"it has no \S*o_proj\.lora_A"), ({"r": 3}, r"it has no \S*lora_A\S* of \(3, ")],
)
def test_a_checkpoint_of_another_training_is_refused(settings, message):
    """Where names do not agree, Lightning would load nothing and go on with the step and the moments of another."""
    written = SelfAugModule(tiny_model(lora={"target_modules": ["q_proj"]}), selfaug(), OptimizerConfig())
    checkpoint: dict = {"state_dict": written.state_dict()}
    written.on_save_checkpoint(checkpoint)
    written.on_load_checkpoint(checkpoint)
    other = tiny_model(lora={"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=rf"^The checkpoint does not fit what is trained here \({message}.*ckpt_path"):
        SelfAugModule(other, selfaug(), OptimizerConfig()).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="it is none of selfaug"):
        written.on_load_checkpoint({"state_dict": checkpoint["state_dict"]})


def test_processes_tell_their_own_loss_from_the_sum_of_all(monkeypatch):
    """Lightning adds up over processes in place: what another's NaN has made of the sum is not one's own."""
    asked = []
    exchanged = lambda self, value: value.fill_(float("nan")) if value.is_floating_point() else value  # noqa: E731
    monkeypatch.setattr(SelfAugModule, "_over_processes", exchanged)
    monkeypatch.setattr(SelfAugModule, "_suspects", lambda self, step, finite: asked.append(finite) or [])
    with pytest.raises(NonFiniteLoss):
        train(selfaug(), make_rows(4))
    assert asked == [True]


def test_many_examples_are_named_in_short():
    message = str(NonFiniteLoss(3, [f"e{i}" for i in range(20)]))
    assert "e7 and 12 more" in message
    assert "e8" not in message


# --- alpha = 0 (invariant 1) ----------------------------------------------------------------------------------------


def test_alpha_0_gives_the_weights_of_plain_training_bit_for_bit():
    rows = make_rows(16)
    settings = {"lora": {"lora_dropout": 0.2}, "loading": {"micro_batch_size": 3, "shuffle": True}, "max_epochs": 3}
    plain, _ = train(Objective(), rows, **settings)
    zero, record = train(selfaug(0.0), rows, **settings)
    other, _ = train(selfaug(0.5), rows, **settings)
    assert len(record.rows) == 6
    assert min(record.column("train/kl")) > 0  # measured all the same
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(zero)[name]), name
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())


def test_the_same_seed_gives_the_same_weights():
    rows = make_rows(16)

    def trained(seed):
        model = tiny_model(lora={"lora_dropout": 0.2})
        torch.manual_seed(torch.seed() % 1000)  # whatever was drawn before
        module = SelfAugModule(model, selfaug(), OptimizerConfig(lr=5e-3), seed=seed)
        trainer().fit(module, loader(rows))
        return weights(model)

    one, two, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_validation_measures_nll_and_the_term_over_all_tokens(micro_batch_size, alpha):
    rows, record = make_rows(7), Record()
    model = tiny_model(lora={"lora_dropout": 0.5})
    module = SelfAugModule(model, selfaug(alpha), OptimizerConfig())
    before = weights(model)
    trainer(record).validate(
        module, loader(rows, step_size=micro_batch_size, micro_batch_size=micro_batch_size), verbose=False
    )
    expected = selfaug_loss(model.eval(), *whole(rows), alpha=0.5)
    (logged,) = record.rows
    assert logged.keys() == {"step", "val/nll", "val/kl"}
    assert logged["val/nll"] == pytest.approx(expected.nll.item(), rel=1e-5)
    assert logged["val/kl"] == pytest.approx(expected.kl.item(), rel=1e-5)
    assert expected.kl > 0.01
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_validation_during_training_starts_from_nothing_each_time_and_leaves_training_mode():
    rows, val = make_rows(16), make_rows(5)
    model, record = train(Objective(), rows, val=val, max_epochs=2)
    assert len(record.column("val/nll")) == 2
    assert model.training
    final = selfaug_loss(model.eval(), *whole(val))
    assert record.column("val/nll")[-1] == pytest.approx(final.nll.item(), rel=1e-5)
    silent, other = train(Objective(), rows, max_epochs=2)
    assert all(torch.equal(value, weights(silent)[name]) for name, value in weights(model).items())
    assert other.column("train/loss") == record.column("train/loss")


def test_the_reference_in_validation_is_the_base_model():
    record, rows = Record(), make_rows(5)
    module = SelfAugModule(tiny_model(lora=True, random_b=False), selfaug(), OptimizerConfig())
    trainer(record).validate(module, loader(rows), verbose=False)
    assert record.column("val/kl") == [pytest.approx(0, abs=1e-6)]


# --- the optimiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"lr": 0.0}, "lr=0"),
        ({"lr": -1e-4}, "lr=-0.0001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0"),
        ({"warmup_ratio": float("nan")}, "warmup_ratio=nan"),
    ],
)
def test_optimiser_settings_out_of_range_are_refused(settings, setting):
    with pytest.raises(UserError, match=rf"^optimizer\.{setting}.* is not allowed: set it .*\.$"):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
        {"eps": -1e-8},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
    ],
    ids=str,
)
def test_what_adamw_or_clipping_would_choke_on_is_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=rf"^optimizer\.{name}="):
        OptimizerConfig(**settings)


def schedule(step, steps, warmup):
    """Linear from 0, then half a cosine to 0 (appendix A.2)."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(("epochs", "ratio", "warmup"), [(40, 0.05, 2), (12, 0.25, 3), (9, 0.05, 0), (5, 0.0, 0)])
def test_the_learning_rate_rises_for_a_share_of_the_steps_and_falls_to_0(epochs, ratio, warmup):
    rates = []

    class Watch(L.Callback):
        def on_train_end(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    _, record = train(
        Objective(), make_rows(2), optimizer=OptimizerConfig(lr=3e-3, warmup_ratio=ratio), max_epochs=epochs,
        callbacks=[Watch()],
    )  # fmt: skip
    expected = [3e-3 * schedule(step, epochs, warmup) for step in range(epochs)]
    assert record.column("train/lr") == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert max(record.column("train/lr")) == pytest.approx(3e-3)
    assert rates == [pytest.approx(0, abs=1e-12)]


def test_the_schedule_ends_with_max_steps():
    _, record = train(Objective(), make_rows(16), max_epochs=50, max_steps=10)
    expected = [5e-3 * schedule(step, 10, 0) for step in range(10)]  # 5 % of ten steps round to none
    assert record.column("train/lr") == pytest.approx(expected, rel=1e-6)


def by_hand(rows, config, steps):
    """The same training in plain torch, one batch a step. Returns the weights and the norms before clipping."""
    model = tiny_model(lora=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
    )
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(step, steps, round(config.warmup_ratio * steps))
        optimizer.zero_grad()
        selfaug_loss(model, *whole(sorted(rows, key=lambda row: row["length"]))).loss.backward()
        if config.max_grad_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item())
        optimizer.step()
    return weights(model), norms


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.0},
        {"weight_decay": 5.0},
        {"max_grad_norm": None},
        {"max_grad_norm": 0.05, "eps": 1e-2},
        {"betas": (0.5, 0.9), "warmup_ratio": 0.5},
    ],
    ids=str,
)
def test_training_is_adamw_with_decay_and_clipping(settings):
    config, rows = OptimizerConfig(**{"lr": 1e-2, "eps": 1e-3, **settings}), make_rows()
    model, _ = train(selfaug(), rows, optimizer=config, max_epochs=4)
    expected, norms = by_hand(rows, config, 4)
    assert_close(weights(model), expected, 2e-6)
    if settings.get("max_grad_norm") == 0.05:
        assert min(norms) > 0.1  # it did clip
    if settings and "betas" not in settings:
        default, _ = by_hand(rows, OptimizerConfig(lr=1e-2, eps=config.eps), 4)
        assert max((default[n] - expected[n]).abs().max().item() for n in expected) > 1e-4


# --- what trains ---------------------------------------------------------------------------------------------------


def test_only_the_adapters_change():
    start = weights(tiny_model(lora=True))
    model, _ = train(selfaug(), make_rows(16), optimizer=OptimizerConfig(lr=1e-2, warmup_ratio=0))
    for name, value in weights(model).items():
        assert torch.equal(value, start[name]) == ("lora_" not in name), name
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_checkpoints_hold_what_trains_and_nothing_of_the_base(tmp_path):
    model = tiny_model(lora=True)
    module = SelfAugModule(model, selfaug(), OptimizerConfig())
    ours = trainer()
    ours.fit(module, loader(make_rows()))
    ours.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == sorted(f"model.{n}" for n, p in model.named_parameters() if p.requires_grad)
    fresh = SelfAugModule(tiny_model(lora=True), selfaug(), OptimizerConfig())
    fresh.load_state_dict(state, strict=fresh.strict_loading)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(fresh.model).items())


def test_a_model_without_a_reference_is_refused_before_training():
    model = tiny_model(lora=True)
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match="train outside the adapters"):
        SelfAugModule(model, selfaug(), OptimizerConfig())
    SelfAugModule(copy.deepcopy(model), Objective(), OptimizerConfig())  # plain training needs none


def test_decay_pulls_matrices_to_0_and_leaves_vectors_where_they_are():
    """DoRA's magnitudes begin at the weights' norms and IA3's factors at 1: 0 is not where the base model is."""
    base = tiny_model()
    for adapter, decayed in (
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), {"lora_A", "lora_B"}),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), set()),
    ):
        model = get_peft_model(copy.deepcopy(base), adapter)
        module = SelfAugModule(model, Objective(), OptimizerConfig(weight_decay=0.1))
        module.trainer = SimpleNamespace(estimated_stepping_batches=4)
        groups = module.configure_optimizers()["optimizer"].param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for group in groups for p in group["params"]} == trained
        kinds = {
            names[id(p)].split("self_attn.")[-1].split(".")[1] for group in groups if group["weight_decay"]
            for p in group["params"]
        }  # fmt: skip
        assert kinds == decayed
