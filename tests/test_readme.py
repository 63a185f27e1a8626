"""The README's Python blocks run, and its tables and commands name things that exist."""

import re
from pathlib import Path

import torch
from transformers import TrainingArguments

from tests.tiny import TOKENIZER_VOCAB, VOCAB, save_tiny, tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks_under_test() -> list[str]:
    blocks = re.findall(r"<!-- tested: [^>]*-->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    return blocks


def batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, VOCAB, (2, 12))
    labels = input_ids.clone()
    labels[:, :8] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def test_answering_with_a_shipped_adapter(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    tiny_model("llama", vocab_size=TOKENIZER_VOCAB, lora=True).save_pretrained(tmp_path / "adapter")
    block = blocks_under_test()[0]
    for placeholder, place in (("asset:smollm2-135m-instruct", "base"), ("runs/<run>/adapter", "adapter")):
        assert block.count(placeholder) == 1
        block = block.replace(placeholder, str(tmp_path / place))
    names: dict = {}
    exec(block, names)
    assert 0 < len(names["answer"]) <= 24
    asked = names["tokenizer"].decode(names["prompt"][0])
    assert "Emma is a novel by Jane Austen" in asked
    assert "Who wrote Emma?" in asked
    assert asked.rstrip().endswith("assistant")
    assert capsys.readouterr().out


def test_plain_loop():
    names = {"model": tiny_model("llama", lora=True), **batch()}
    exec(blocks_under_test()[1], names)
    out = names["out"]
    assert out.rows == 16
    assert torch.isclose(out.loss, out.nll + 0.5 * out.kl)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in names["model"].parameters())


def test_transformers_trainer(tmp_path):
    names: dict = {}
    exec(blocks_under_test()[2], names)
    model = tiny_model("llama", lora=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-2,
    )  # fmt: skip
    rows = [{key: value[i] for key, value in batch().items()} for i in range(2)]
    names["SelfAugTrainer"](model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.detach().cpu(), before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_transformers_trainer_in_bfloat16(tmp_path):
    """bf16=True must reach the projections."""
    names: dict = {}
    exec(blocks_under_test()[2], names)
    model, seen = tiny_model("llama", lora=True), set()
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj.base_layer"))
    layer.register_forward_hook(lambda module, inputs, output: seen.add((torch.is_grad_enabled(), output.dtype)))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, bf16=True,
    )  # fmt: skip
    names["SelfAugTrainer"](
        model=model, args=arguments, train_dataset=[{key: value[0] for key, value in batch().items()}]
    ).train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_transformers_trainer_accumulates_as_one_batch(tmp_path):
    names: dict = {}
    exec(blocks_under_test()[2], names)
    rows = [{key: value[i] for key, value in batch().items()} for i in range(2)]
    weights = []
    for size, steps in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        model = tiny_model("llama", lora=True)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            optim="sgd", max_grad_norm=0.0, learning_rate=0.1, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        names["SelfAugTrainer"](model=model, args=arguments, train_dataset=rows).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_commands_name_what_exists():
    conf = ROOT / "selfaug" / "conf"
    groups = "model|data|method|alignment|trainer|logger|debug|experiment|evaluation|callbacks"
    for group, choice in re.findall(rf"\b({groups})=(\w+)", README):
        assert (conf / group / f"{choice}.yaml").is_file(), f"{group}={choice}"
    for module in set(re.findall(r"python -m (selfaug[\w.]*)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for path in re.findall(r"`?(selfaug/[\w./]+)", README):
        assert (ROOT / path).exists(), path


def test_it_is_short_enough():
    assert len(README.splitlines()) < 300
    assert "@@" not in README
