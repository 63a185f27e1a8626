"""selfaug_loss: the official code's numbers on its golden files, and training loops that people bring along."""

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import selfaug
from selfaug.errors import UserError
from selfaug.loss import RowCounts, SelfAugLoss, count_rows, selfaug_loss
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.model.reference import AdaptersOff
from tests.tiny import lora_config, random_batch, randomise_b, tiny_model

OFFICIAL = Path(__file__).parent / "data" / "official_parity"
SHA256 = {
    "README.md": "285cf867278ffe65d96df2d95a08f4721f08f52fa1f41b14307dccd9d427f22a",
    "adapter_config.json": "173c198fd59de5b30c4423f482153153e24851f35714d659dd1e8808da92e13a",
    "adapter_model.safetensors": "e8e06fad75338d9c4657fc537294a8c512fbbf68c19729ec9f3e6840b5451f3b",
    "base/config.json": "8a60de6630276149e8abb300c965e680eeb1802a3aa91c0d7d43cd5e8d7dd7c4",
    "base/generation_config.json": "3af6fe4698bf9baf85cdbdeecb9da5fc0473a9360d5b4f348062e4e670ab42dd",
    "base/model.safetensors": "517a24a97d51f0753f238815e4cdb517d166c1aa12564980255ed0cd71054284",
    "expected.json": "472acf0f5bb0f920094c9be7711cc6bdd766ee3c67109893ca7f09f075fec005",
    "single.safetensors": "6e1e2954c638632f4c22d274775a2f4f3d79e2c5978e145b629da7b42e2bf40f",
}
EXPECTED = json.loads((OFFICIAL / "expected.json").read_text())
ROWS = {  # expected.json's name of a choice of rows -> our settings
    "official": {"official": True},
    "input_with_boundary": {},
    "input_strict": {"boundary": False},
    "output": {"position": "output_logits"},
    "all": {"position": "all_logits"},
}

# --- the official code --------------------------------------------------------------------------------------------


def test_the_golden_files_are_untouched():
    found = {
        path.relative_to(OFFICIAL).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in OFFICIAL.rglob("*")
        if path.is_file()
    }
    assert found == SHA256


@pytest.fixture
def official_model() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(OFFICIAL / "base", dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, OFFICIAL, is_trainable=True)


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    return load_file(OFFICIAL / "single.safetensors")


def tensors(example):
    return example["input_ids"], example["attention_mask"], example["labels"]


def test_official_loss_and_gradients(official_model, official):
    """alpha = 0.5 and all defaults: one example without padding is where our rows and the official ones agree."""
    losses = selfaug_loss(official_model, *tensors(official))
    for name in ("loss", "nll", "kl"):
        assert getattr(losses, name).item() == pytest.approx(official[name].item(), rel=1e-6)
    assert losses.loss.item() == pytest.approx(losses.nll.item() + 0.5 * losses.kl.item(), rel=1e-6)
    losses.loss.backward()
    found = {n.replace(".default", ""): p.grad for n, p in official_model.named_parameters() if p.requires_grad}
    golden = {n.removeprefix("grad.").replace(".default", ""): g for n, g in official.items() if n.startswith("grad.")}
    assert found.keys() == golden.keys()
    assert len(golden) == 42  # 3 layers, 7 linear layers, A and B
    for name, gradient in golden.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        assert gradient.norm() > 1e-3, name


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", ["kl_base_tuned", "kl_tuned_base"])
def test_official_value_of_every_choice(official_model, official, divergence, rows):
    losses = selfaug_loss(official_model, *tensors(official), divergence=divergence, **ROWS[rows])
    assert losses.nll.item() == pytest.approx(EXPECTED["nll"], rel=1e-5)
    assert losses.kl.item() == pytest.approx(EXPECTED[f"{divergence}/{rows}"], rel=1e-5)
    assert losses.rows == EXPECTED[f"rows/{rows}"]


def test_every_expected_number_is_tested():
    tested = {f"{d}/{rows}" for d in ("kl_base_tuned", "kl_tuned_base", "rows") for rows in ROWS} | {"nll"}
    assert tested == EXPECTED.keys()


def test_official_rows_count_padding_and_ours_do_not(official_model, official):
    """The mask of the official code is labels == -100, whatever the attention mask says."""
    ids, mask, labels = (
        torch.nn.functional.pad(t, (0, 5), value=v) for t, v in zip(tensors(official), (7, 0, -100), strict=True)
    )
    ours = selfaug_loss(official_model, ids, mask, labels)
    padded = selfaug_loss(official_model, ids, mask, labels, official=True)
    assert ours.kl.item() == pytest.approx(EXPECTED["kl_base_tuned/official"], rel=1e-5)
    assert (ours.rows, padded.rows) == (18, 23)
    assert abs(padded.kl.item() / ours.kl.item() - 1) > 1e-3


# --- the function itself ------------------------------------------------------------------------------------------


def test_returns_scalars_with_a_graph():
    losses = selfaug_loss(tiny_model(lora=True), *random_batch())
    assert isinstance(losses, SelfAugLoss)
    assert all(value.shape == () and value.requires_grad for value in losses[:3])
    assert losses.rows == 9 + 14 + 6 - (3 + 5 + 2)
    assert selfaug.selfaug_loss is selfaug_loss


def test_no_mask_means_no_padding():
    model = tiny_model(lora=True)
    ids, mask, labels = random_batch((9, 9), (3, 4))
    one, two = selfaug_loss(model, ids, None, labels), selfaug_loss(model, ids, mask, labels)
    assert one.loss == two.loss
    assert one.rows == two.rows


def test_injected_adapters_equal_a_peft_model():
    ids, mask, labels = random_batch()
    model = inject_adapter_in_model(lora_config(exclude_modules=["lm_head"]), tiny_model())
    randomise_b(model)
    wrapped = tiny_model(lora=True)
    named = dict(wrapped.get_base_model().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(named[name])
    assert selfaug_loss(model, ids, mask, labels).loss == selfaug_loss(wrapped, ids, mask, labels).loss


def split(batch, size):
    return list(zip(*(t.split(size) for t in batch), strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"boundary": False}, {"position": "all_logits"}, {"official": True}], ids=str)
def test_step_rows_make_micro_batches_one_step(size, settings):
    model = tiny_model(lora=True)
    batch = random_batch((9, 14, 6, 11, 3, 10, 14, 7), (3, 5, 2, 4, 2, 9, 1, 6))

    def gradients():
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    whole = selfaug_loss(model, *batch, **settings)
    whole.loss.backward()
    expected = gradients()

    parts = split(batch, size)
    counts = [count_rows(mask, labels, **settings) for _, mask, labels in parts]
    step_rows = RowCounts(*(sum(column) for column in zip(*counts, strict=True)))
    assert step_rows == count_rows(batch[1], batch[2], **settings)
    assert step_rows.aligned == whole.rows
    sums = [0.0, 0.0, 0.0]
    for part in parts:
        losses = selfaug_loss(model, *part, step_rows=step_rows, **settings)
        losses.loss.backward()
        sums = [s + value.item() for s, value in zip(sums, losses[:3], strict=True)]
    assert sums == pytest.approx([value.item() for value in whole[:3]], rel=1e-5)
    for one, other in zip(gradients(), expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_share_of_the_rows():
    model, tensors = tiny_model(lora=True), random_batch((9, 14, 6), (3, 5, 2))
    full = selfaug_loss(model, *tensors)
    draws = [selfaug_loss(model, *tensors, rows="random", share=0.25, draw=(1, step)) for step in range(150)]
    assert all(loss.rows == full.rows and loss.nll == full.nll for loss in draws)
    kls = torch.stack([loss.kl for loss in draws]).detach()
    assert kls.unique().numel() > 15
    assert abs(kls.mean() - full.kl.item()) < 4 * kls.std() / len(kls) ** 0.5
    again = selfaug_loss(model, *tensors, rows="random", share=0.25, draw=(1, 7))
    assert again.kl == draws[7].kl
    with torch.no_grad():  # validation
        assert selfaug_loss(model, *tensors, rows="random", share=0.25).kl == full.kl
    with pytest.raises(ValueError, match=r"draw=\(seed, step\)"):
        selfaug_loss(model, *tensors, rows="random", share=0.25)


def test_a_reference_of_ones_own():
    class Remembered(AdaptersOff):
        calls = 0

        def states(self, *arguments, **settings):
            self.calls += 1
            return super().states(*arguments, **settings)

    model, tensors, reference = tiny_model(lora=True), random_batch((9, 14, 6), (3, 5, 2)), Remembered()
    assert selfaug_loss(model, *tensors, reference=reference).kl == selfaug_loss(model, *tensors).kl
    assert reference.calls == 1


class Counted:
    """A reference that says how often it was checked."""

    def __init__(self):
        self.checks = 0

    def check(self, model):
        self.checks += 1

    def states(self, decoder, tokens, **settings):
        return AdaptersOff().states(decoder, tokens, **settings)


def test_a_reference_is_checked_once_for_each_model():
    """It may take a pass over all weights, which are others after the first step where they train."""
    reference, models = Counted(), [tiny_model(lora=True) for _ in range(2)]
    for model in (models[0], models[0], models[1], models[0]):
        selfaug_loss(model, *random_batch(), reference=reference)
    assert reference.checks == 2
    models[0].get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(UserError, match="output head trains"):
        selfaug_loss(models[0], *random_batch(), reference=reference)


def test_a_frozen_copy_serves_while_the_base_weights_train():
    model, base = tiny_model("llama"), tiny_model("llama")
    model.get_output_embeddings().requires_grad_(False)
    reference, kl = FrozenCopy(lambda: base), []
    for _ in range(3):
        losses = selfaug_loss(model, *random_batch(), reference=reference)
        losses.loss.backward()
        kl.append(losses.kl.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
    assert kl[0] == 0 < kl[1]


def test_labels_that_leave_nothing_to_align_are_named():
    model, (ids, mask, _) = tiny_model(lora=True), random_batch((9, 9), (3, 4))
    with pytest.warns(UserWarning, match="no row to align.*-100 on the prompt"):
        assert selfaug_loss(model, ids, mask, ids).rows == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selfaug_loss(model, ids, mask, ids, position="output_logits")
        selfaug_loss(model, ids, mask, torch.full_like(ids, -100))


def test_autocast_around_the_first_call_leaves_the_gradients():
    """The model is looked at first, under no_grad: casts of the adapter that this leaves behind have no graph."""
    gradients = []
    for looked_at in (False, True):
        torch.manual_seed(0)
        model = tiny_model(lora=True)
        if looked_at:
            selfaug_loss(model, *random_batch())
        with torch.autocast("cpu", torch.bfloat16):
            losses = selfaug_loss(model, *random_batch())
        losses.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_wrong_use_is_refused():
    model = tiny_model(lora=True)
    ids, mask, labels = random_batch()
    with pytest.raises(ValueError, match="labels"):
        selfaug_loss(model, ids, mask, labels[:, 1:])
    with pytest.raises(UserError, match=r"alignment\.alpha=-1"):
        selfaug_loss(model, ids, mask, labels, alpha=-1)
    with pytest.raises(UserError, match=r"^DataParallel exchanges gradients .*\.module .*trainer=ddp"):
        selfaug_loss(torch.nn.DataParallel(model), ids, mask, labels)
    with pytest.raises(UserError, match=r"alignment\.position=x"):
        count_rows(mask, labels, position="x")
    for position in ("document_logits", "question_logits"):  # there would be no row, and a KL of 0
        with pytest.raises(UserError, match=f"position={position} needs to know"):
            count_rows(None, torch.zeros(1, 3, dtype=torch.long), position=position)
    with pytest.raises(UserError, match="no adapters"):
        selfaug_loss(tiny_model(), ids, mask, labels)
    selfaug_loss(model, ids, mask, labels)  # a good call: what follows is checked on every call, not on the first alone
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match="train outside the adapters"):
        selfaug_loss(model, ids, mask, labels)


def test_an_unknown_family_is_refused_before_it_trains():
    model = tiny_model(lora=True)
    inner = model.get_base_model()
    forward = inner.forward

    def doctored(**arguments):
        out = forward(**arguments)
        out.logits = 2 * out.logits
        return out

    inner.forward = doctored
    for _ in range(2):  # a refused model is not remembered as a good one
        with pytest.raises(UserError, match="turns hidden states into logits"):
            selfaug_loss(model, *random_batch())


# --- people's own training loops ----------------------------------------------------------------------------------


def frozen_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_plain_torch_loop():
    model = tiny_model(lora=True, random_b=False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, mask, labels = random_batch()
    before = frozen_weights(model)
    history = []
    for _ in range(6):
        losses = selfaug_loss(model, ids, mask, labels, alpha=0.5)
        losses.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        history.append((losses.loss.item(), losses.kl.item()))
    assert history[0][1] == 0.0
    assert all(kl > 0 for _, kl in history[1:])
    assert history[-1][0] < 0.9 * history[0][0]
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


class Examples(torch.utils.data.Dataset):
    """Four examples of 14 tokens: [T] tensors, as a Trainer's default collator stacks them."""

    def __init__(self):
        self.tensors = random_batch((9, 14, 6, 11), (3, 5, 2, 4))

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return {k: t[i] for k, t in zip(("input_ids", "attention_mask", "labels"), self.tensors, strict=True)}


class SelfAugTrainer(transformers.Trainer):
    """What the README shows: the Trainer hands over all micro-batches of a step, whose rows are counted first."""

    step_rows: RowCounts | None = None
    kls: list[float]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count_rows(b["attention_mask"], b["labels"]) for b in batches]
        self.step_rows = RowCounts(*(sum(column) for column in zip(*counts, strict=True)))
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = selfaug_loss(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], step_rows=self.step_rows
        )
        self.kls.append(losses.kl.item())
        return losses.loss


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_transformers_trainer(tmp_path, batch_size, accumulation):
    """Three steps; the cut into micro-batches does not change the weights."""
    weights = {}
    for size, steps in ((4, 1), (batch_size, accumulation)):
        model = tiny_model(lora=True, random_b=False)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = SelfAugTrainer(model=model, args=arguments, train_dataset=Examples())
        trainer.kls = []
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        assert losses[-1] < losses[0]
        assert trainer.kls[:steps] == [0.0] * steps
        assert all(kl > 0 for kl in trainer.kls[steps:])
        weights[size] = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert torch.allclose(weights[4], weights[batch_size], rtol=1e-3, atol=1e-5)
