"""How alpha changes: the schedules' values by hand, the controllers on a plant, training, checkpoints."""

import math

import pytest
import torch

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.load import recompute_activations
from selfaug.module import OptimizerConfig, SelfAugModule
from selfaug.objective import LogitAlignment, Objective
from selfaug.objective.alphas import Alphas, Balance
from selfaug.objective.schedules import Constant, Cosine, GradientBalance, KLTarget, Linear, Observed, WarmupDecay
from tests.objective.test_objective import make_batch
from tests.test_module import make_rows, train, weights
from tests.tiny import tiny_model


def curve(schedule, start=0.8, steps=5):
    return [schedule.alpha(start, step, steps) for step in range(steps)]


def test_fixed_schedules_by_hand():
    assert curve(Constant()) == [0.8] * 5
    assert curve(Linear()) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert curve(Linear(end=1.6)) == pytest.approx([0.8, 1.0, 1.2, 1.4, 1.6])
    half = math.cos(math.pi / 4)
    assert curve(Cosine()) == pytest.approx([0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half), 0.0])
    assert curve(Cosine(end=0.2))[::2] == pytest.approx([0.8, 0.5, 0.2])
    warm = curve(WarmupDecay(0.4), steps=10)
    assert warm[:5] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert warm[5:] == sorted(warm[5:], reverse=True)
    assert warm[-1] == pytest.approx(0)
    assert curve(WarmupDecay(0.0)) == curve(Cosine())
    for schedule in (Linear(), Cosine(), WarmupDecay()):
        assert 0 <= schedule.alpha(0.8, 0, 1) <= 0.8  # a training of one step


@pytest.mark.parametrize("start", [0.01, 30.0])
def test_the_controller_finds_the_target(start):
    """A plant in which the KL falls as alpha rises: whatever it starts from, it ends at the target and stays."""
    schedule = KLTarget(target=0.05)
    alpha = start
    for step in range(200):
        alpha = schedule.alpha(start, step, 200)
        schedule.observe(start, Observed(penalty=0.1 / (1 + alpha)))
    assert 0.1 / (1 + alpha) == pytest.approx(0.05, rel=0.02)
    assert alpha == pytest.approx(1.0, rel=0.05)


def test_the_controller_by_hand():
    schedule = KLTarget(target=0.1, gain=0.5, clip=0.4, least=0.01, most=0.6)
    schedule.observe(0.5, Observed(penalty=0.11))
    assert schedule.alpha(0.5, 1, 9) == pytest.approx(0.5 * 1.05)
    schedule.observe(0.5, Observed(penalty=5.0))  # clipped to 0.4, then to the largest alpha
    assert schedule.alpha(0.5, 2, 9) == 0.6
    schedule.observe(0.5, Observed(penalty=0.0))
    assert schedule.alpha(0.5, 3, 9) == pytest.approx(0.6 * 0.8)
    drifting = KLTarget(target=0.1, signal="drift")
    drifting.observe(0.5, Observed(penalty=9.0))  # not measured in this step
    assert drifting.alpha(0.5, 1, 9) == 0.5
    drifting.observe(0.5, Observed(penalty=9.0, drift=0.09))
    assert drifting.alpha(0.5, 2, 9) == pytest.approx(0.5 * 0.95)
    schedule = KLTarget(target=0.1)
    schedule.observe(0.5, Observed(penalty=None))  # a step without a row of the term says nothing of its KL
    assert schedule.alpha(0.5, 1, 9) == 0.5
    for kind in (KLTarget, GradientBalance):
        with pytest.raises(UserError, match=r"least=2.0 is above alignment\.schedule\.most=1.0"):
            kind(least=2.0, most=1.0)


def test_balance_by_hand():
    schedule = GradientBalance(ratio=2.0, every=3, smoothing=0.5)
    assert [schedule.wants_gradients(step) for step in range(7)] == [False, False, True, False, False, True, False]
    schedule.observe(0.5, Observed(penalty=0.1))  # not measured
    schedule.observe(0.5, Observed(penalty=0.0, nll_norm=3.0, term_norm=0.0))  # tuned is still base
    assert schedule.alpha(0.5, 1, 9) == 0.5
    schedule.observe(0.5, Observed(penalty=0.1, nll_norm=3.0, term_norm=0.75))
    assert schedule.alpha(0.5, 2, 9) == pytest.approx(math.sqrt(0.5 * 8.0))
    # With a warm-up nothing has moved before the third step.
    assert [GradientBalance(every=1).wants_gradients(step) for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_norms_of_the_two_gradients(checkpointing):
    """Against each part's own backward pass."""
    model = tiny_model(lora=True)
    if checkpointing:
        recompute_activations(model)
    objective = Objective({"kl": LogitAlignment(0.6)})
    batches = [make_batch(seed=0), make_batch(seed=1)]
    totals = sum(objective.count(batch) for batch in batches)
    expected = []
    for part in ("nll", "kl"):
        model.zero_grad()
        for batch in batches:
            objective(Decoder(model), batch, totals).parts[part].backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        expected.append(norm * (0.6 if part == "kl" else 1))
    model.zero_grad()
    balance = Balance(model)
    for batch in batches:
        losses = objective(Decoder(model), batch, totals)
        balance.add(losses.parts["nll"])
        losses.loss.backward()
    assert balance.norms(lambda gradient: gradient) == pytest.approx(expected, rel=1e-4)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"alignment.alpha=0 stays 0"):
        LogitAlignment(0.0, schedule=KLTarget())
    LogitAlignment(0.0, schedule=Linear(end=1.0))
    terms = {"kl": LogitAlignment(schedule=GradientBalance()), "out": LogitAlignment(position="output_logits")}
    with pytest.raises(UserError, match="alignment/schedule=gradient_balance balances the NLL with one term"):
        Alphas(terms)
    for wrong, words in (
        (lambda: Linear(end=-1), "alignment.schedule.end=-1"),
        (lambda: WarmupDecay(1.0), "alignment.schedule.warmup_ratio=1.0"),
        (lambda: KLTarget(target=0), "alignment.schedule.target=0"),
        (lambda: KLTarget(signal="nose"), "alignment.schedule.signal=nose"),
        (lambda: KLTarget(gain=3.0), "gain times clip"),
        (lambda: GradientBalance(every=0), "alignment.schedule.every=0"),
        (lambda: GradientBalance(smoothing=1.0), "alignment.schedule.smoothing=1.0"),
        (lambda: GradientBalance(ratio=-1), "alignment.schedule.ratio=-1"),
    ):
        with pytest.raises(UserError, match=words):
            wrong()


# ---- in training ---------------------------------------------------------------------------------------------------


def scheduled(schedule, alpha=0.5, **settings):
    return Objective({"kl": LogitAlignment(alpha, schedule=schedule, **settings)})


def test_a_constant_schedule_changes_no_bit():
    plain, _ = train(Objective({"kl": LogitAlignment(0.5)}), make_rows(12), max_epochs=2)
    constant, _ = train(scheduled(Constant()), make_rows(12), max_epochs=2)
    assert all(torch.equal(weight, weights(constant)[name]) for name, weight in weights(plain).items())


def test_a_schedule_is_followed_and_logged():
    _, record = train(scheduled(Linear()), make_rows(8), loading={"step_size": 2}, max_epochs=2)
    alphas = record.column("train/alpha")
    assert alphas == pytest.approx([0.5 * (1 - i / 7) for i in range(8)])
    nll, kl, loss = (record.column(f"train/{name}") for name in ("nll", "kl", "loss"))
    assert loss == pytest.approx([n + a * k for n, a, k in zip(nll, alphas, kl, strict=True)], rel=1e-5)
    assert kl[-1] > 0  # with weight 0 it is still measured


def test_where_alpha_is_0_all_along_training_is_plain():
    plain, _ = train(Objective(), make_rows(8), max_epochs=2)
    zero, _ = train(scheduled(Linear(end=0.0), alpha=0.0), make_rows(8), max_epochs=2)
    assert all(torch.equal(weight, weights(zero)[name]) for name, weight in weights(plain).items())


@pytest.mark.parametrize(
    "make", [lambda: KLTarget(target=0.2, gain=0.9, clip=1.0), lambda: GradientBalance(every=2, ratio=3.0)]
)
def test_adaptive_schedules_move_alpha_and_keep_it(make):
    """What a checkpoint holds is all there is to know. (Runs that are killed and resumed: tests/run/test_resume.py.)"""
    schedule = make()
    _, record = train(scheduled(schedule), make_rows(12), loading={"step_size": 2}, max_epochs=2)
    alphas = record.column("train/alpha")
    assert len(alphas) == 12
    assert alphas[0] == 0.5
    assert len(set(alphas)) > 3
    module = SelfAugModule(tiny_model(lora=True), scheduled(schedule), OptimizerConfig())
    checkpoint: dict = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    again = SelfAugModule(tiny_model(lora=True), scheduled(make()), OptimizerConfig())
    again.on_load_checkpoint(checkpoint)
    assert again.alphas(12, 24) == module.alphas(12, 24) != {"kl": 0.5}
    plain = SelfAugModule(tiny_model(lora=True), Objective(), OptimizerConfig())
    other: dict = {"state_dict": plain.state_dict()}
    plain.on_save_checkpoint(other)
    with pytest.raises(UserError, match=r"checkpoint does not fit .*no schedule of kl.*ckpt_path"):
        again.on_load_checkpoint(other)


def test_the_controller_holds_the_kl_in_training():
    """With a target well below what alpha alone would allow, the KL ends near it."""
    rows, settings = make_rows(8), {"max_epochs": 60, "optimizer": OptimizerConfig(lr=1e-2, warmup_ratio=0.0)}
    _, record = train(scheduled(None, alpha=0.02), rows, random_b=False, **settings)
    unheld = record.column("train/kl")[-1]
    target = unheld / 4
    _, record = train(scheduled(KLTarget(target=target), alpha=0.02), rows, random_b=False, **settings)
    assert record.column("train/kl")[-1] == pytest.approx(target, rel=0.5)
    assert unheld > 3 * target
