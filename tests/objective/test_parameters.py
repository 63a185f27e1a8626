"""Terms on weights against formulas written out on whole matrices, in float64; alpha 0; what is refused."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from selfaug.errors import UserError
from selfaug.objective import L2SP, Objective, OLoRA, Orthogonal
from tests.objective.test_objective import assert_close_gradients, gradients
from tests.test_module import make_rows, train, weights
from tests.tiny import randomise_b, tiny_model

RSLORA = {"use_rslora": True, "r": 3, "lora_alpha": 5}


def layers(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def matrices(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight


def check(term, model, expected):
    """Value and gradient of term.penalty against those of `expected`, a scalar with a graph."""
    model.zero_grad()
    expected.backward()
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    found = term.penalty(model)
    found.backward()
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    assert expected.item() > 0
    assert_close_gradients(gradients(model), wanted, relative=1e-9)


# --- L2-SP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, RSLORA], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_l2sp_of_lora_is_the_square_of_what_it_adds_to_the_weights(family, lora):
    model = tiny_model(family, lora=lora, random_b=False).double()
    term = L2SP()
    term.start(model)
    assert term.held_bytes(model) == 0
    randomise_b(model)
    added = [layer.get_delta_weight("default") for layer in layers(model)]  # peft's own s * B A
    check(term, model, sum(d.square().sum() for d in added) / 2)


def test_l2sp_of_an_adapter_that_has_trained_before_is_the_change_since_then():
    model = tiny_model(lora=True).double()
    term = L2SP()
    term.start(model)
    assert term.held_bytes(model) == 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert term.penalty(model).item() == pytest.approx(0, abs=1e-12)
    before = [layer.get_delta_weight("default").detach() for layer in layers(model)]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    after = [layer.get_delta_weight("default") for layer in layers(model)]
    check(term, model, sum((a - b).square().sum() for a, b in zip(after, before, strict=True)) / 2)


def test_l2sp_of_full_fine_tuning_is_the_distance_to_the_start():
    model = tiny_model().double()
    start = weights(model)
    term = L2SP()
    term.start(model)
    assert term.held_bytes(model) == 8 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    check(term, model, sum((p - start[name]).square().sum() for name, p in model.named_parameters()) / 2)


def test_l2sp_is_0_where_the_training_starts():
    model = tiny_model(lora=True, random_b=False)
    term = L2SP()
    term.start(model)
    assert term.penalty(model).item() == 0


# --- orthogonality --------------------------------------------------------------------------------------------------


def test_orthogonal_is_the_mean_cosine_of_rows():
    model = tiny_model("qwen2", lora=True).double()
    means = []
    for layer in layers(model):
        a, _, w = matrices(layer)
        cosines = nn.functional.cosine_similarity(a.unsqueeze(1), w.unsqueeze(0), dim=-1)  # [r, out]
        means.append(cosines.abs().mean() * a.shape[1] ** 0.5)
    term = Orthogonal()
    term.start(model)
    check(term, model, torch.stack(means).mean())


def test_orthogonal_as_in_o_lora_is_a_plain_sum():
    model = tiny_model(lora=True).double()
    pairs = [matrices(layer) for layer in layers(model)]
    check(Orthogonal(scale_free=False), model, sum((w @ a.T).abs().sum() for a, _, w in pairs))


def test_scale_free_the_size_of_a_does_not_matter():
    model = tiny_model(lora=True).double()
    free, summed = Orthogonal(), Orthogonal(scale_free=False)
    before = free.penalty(model).item(), summed.penalty(model).item()
    assert 0.5 < before[0] < 1.1  # of random matrices about 0.8
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A["default"].weight.mul_(3)
    assert free.penalty(model).item() == pytest.approx(before[0], rel=1e-12)
    assert summed.penalty(model).item() == pytest.approx(3 * before[1], rel=1e-12)


def test_training_makes_a_more_orthogonal():
    rows, term = make_rows(8), Orthogonal(alpha=5.0)
    _, record = train(Objective({"orthogonal": term}), rows, random_b=False, max_epochs=20)
    found = record.column("train/orthogonal")
    assert found[-1] < 0.8 * found[0]


def test_o_lora_is_the_overlap_with_an_earlier_adapter(tmp_path):
    earlier = tiny_model(lora={"r": 6}, seed=7)
    earlier.save_pretrained(tmp_path / "earlier")
    model = tiny_model(lora=True)
    term = OLoRA(str(tmp_path / "earlier"))
    term.start(model)
    sums = [
        (matrices(old)[0].double() @ matrices(new)[0].double().T).abs().sum()
        for old, new in zip(layers(earlier), layers(model), strict=True)
    ]
    assert len(sums) == 14
    assert term.penalty(model).item() == pytest.approx(sum(sums).item(), rel=1e-5)
    assert term.held_bytes(model) == 4 * sum(matrices(layer)[0].numel() for layer in layers(earlier))
    model = model.double()
    again = OLoRA(str(tmp_path / "earlier"))
    again.start(model)
    old = [matrices(layer)[0].detach().double() for layer in layers(earlier)]
    check(again, model, sum((o @ matrices(n)[0].T).abs().sum() for o, n in zip(old, layers(model), strict=True)))


# --- in training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> str:
    tiny_model(lora=True, seed=7).save_pretrained(tmp_path / "earlier")
    return str(tmp_path / "earlier")


def test_alpha_0_is_plain_lora_bit_for_bit_and_more_is_not(adapter):
    rows = make_rows(16)
    settings = {"lora": {"lora_dropout": 0.2}, "loading": {"micro_batch_size": 3}, "max_epochs": 2}
    plain, _ = train(Objective(), rows, **settings)
    for make in (L2SP, Orthogonal, lambda alpha: OLoRA(adapter, alpha)):
        same, record = train(Objective({"term": make(alpha=0.0)}), rows, **settings)
        other, _ = train(Objective({"term": make(alpha=1.0)}), rows, **settings)
        assert record.column("train/term")[-1] > 0  # measured all the same
        assert record.column("train/loss") == record.column("train/nll")
        assert all(torch.equal(value, weights(same)[name]) for name, value in weights(plain).items())
        assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())


def test_the_loss_has_alpha_times_the_penalty_once_however_the_step_is_cut():
    rows = make_rows(8)
    losses = []
    for size in (8, 1, 3):
        _, record = train(Objective({"l2sp": L2SP(alpha=0.3)}), rows, loading={"micro_batch_size": size})
        (logged,) = record.rows
        assert logged["train/loss"] == pytest.approx(logged["train/nll"] + 0.3 * logged["train/l2sp"], rel=1e-6)
        losses.append((logged["train/loss"], logged["train/grad_norm"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_in_bfloat16_sums_run_in_float32():
    model = tiny_model(lora=True)
    objective = Objective({"l2sp": L2SP()})
    objective.start(model)
    exact = objective.penalties(model)[1]["l2sp"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective.penalties(model)[1]["l2sp"]
    assert torch.equal(mixed, exact)
    low = L2SP().penalty(model.bfloat16())
    assert low.dtype == torch.float32


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), "much"])
@pytest.mark.parametrize("make", [L2SP, Orthogonal, lambda alpha: OLoRA("somewhere", alpha)])
def test_alpha_out_of_range(make, alpha):
    with pytest.raises(UserError, match=r"method\.terms is not allowed: set it to 0 or a positive number\.$"):
        make(alpha=alpha)


def test_models_that_the_formulas_are_not_for():
    dora = tiny_model(lora={"use_dora": True})
    for term in (L2SP(), Orthogonal()):
        with pytest.raises(UserError, match=r"has a Dora: set adapter=lora\.$"):
            term.start(dora)
    embedding = tiny_model(lora={"target_modules": ["embed_tokens", "q_proj"]})
    for term in (L2SP(), Orthogonal()):
        with pytest.raises(UserError, match=r"is an embedding with LoRA: take it out of adapter\.target_modules\.$"):
            term.start(embedding)
    with pytest.raises(UserError, match="set adapter=lora"):
        Orthogonal().start(tiny_model())
    two = tiny_model(lora=True)
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(UserError, match="train one only"):
        L2SP().start(two)
    quantised = tiny_model(lora=True)
    layer = layers(quantised)[0].get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="are quantised"):
        Orthogonal().start(quantised)


def test_adapters_that_o_lora_cannot_use(tmp_path):
    with pytest.raises(UserError, match="There is no adapter to be read in"):
        OLoRA(str(tmp_path)).start(tiny_model(lora=True))
    tiny_model(lora=True, hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="is not for this model"):
        OLoRA(str(tmp_path / "wide")).start(tiny_model(lora=True))
    tiny_model(lora={"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "q")
    with pytest.raises(UserError, match="shares no layer"):
        OLoRA(str(tmp_path / "q")).start(tiny_model(lora={"target_modules": ["up_proj"]}))
