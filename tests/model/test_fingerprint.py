"""The fingerprint of a base model changes with all that decides what it computes, and with nothing else."""

import pytest
import torch
from peft import inject_adapter_in_model
from transformers import AutoModelForCausalLM

from selfaug.model.fingerprint import base_tensors, model_digest, place_digest, tensor_bytes
from tests.tiny import FAMILIES, lora_config, tiny_model

each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_every_weight_and_buffer_counts(family):
    model = tiny_model(family)
    before, tensors = model_digest(model), base_tensors(model)
    assert {id(p) for p in model.parameters()} <= {id(tensor) for tensor in tensors.values()}
    assert {name for name, _ in model.named_buffers() if "inv_freq" not in name} <= tensors.keys()
    for name, tensor in tensors.items():
        with torch.no_grad():
            flat = tensor.view(-1)
            kept = flat[-1].clone()
            flat[-1] = torch.nextafter(kept, torch.tensor(torch.inf))  # the last bit of the last element
            assert model_digest(model) != before, name
            flat[-1] = kept
    assert model_digest(model) == before


@each_family
def test_adapters_and_their_training_do_not_count(family):
    expected = model_digest(tiny_model(family))
    wrapped = tiny_model(family, lora=True)
    injected = inject_adapter_in_model(
        lora_config(exclude_modules=["lm_head", "embed_out"]), tiny_model(family)
    )  # names without peft's prefix
    for model in (wrapped, injected):
        assert model_digest(model) == expected
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        assert model_digest(model) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_other_adapters_do_not_count(settings):
    model = tiny_model(lora=settings)
    assert model_digest(model) == model_digest(tiny_model())
    with torch.no_grad():
        base = base_tensors(model)["model.embed_tokens.weight"]
        base[3, 3] += 1e-3
    assert model_digest(model) != model_digest(tiny_model())


def test_tied_weights_are_named_twice_and_equal_to_nothing_untied():
    tied = base_tensors(tiny_model("qwen2"))
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]


def test_large_tensors_are_hashed_whole(monkeypatch):
    """In pieces, on several threads: each of them counts, and their order."""
    monkeypatch.setattr("selfaug.model.fingerprint._CHUNK", 64)
    model = tiny_model()
    before = model_digest(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        flat = weight.view(-1)
        for place in range(0, flat.numel(), 16):
            kept = flat[place].clone()
            flat[place] = kept + 1
            assert model_digest(model) != before
            flat[place] = kept
        assert model_digest(model) == before
        chunks = flat.clone().view(-1, 16)
        flat.copy_(chunks.flip(0).reshape(-1))
    assert model_digest(model) != before


def test_where_the_model_lies_does_not_count(tmp_path):
    tiny_model().save_pretrained(tmp_path / "one")
    tiny_model().save_pretrained(tmp_path / "two")
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager") for name in ("one", "two")
    ]
    assert model_digest(loaded[0]) == model_digest(loaded[1])
    loaded[1].config.use_cache = False
    assert model_digest(loaded[0]) == model_digest(loaded[1])


def _changed(name):
    model = tiny_model()
    if name == "configuration":
        model.config.rms_norm_eps *= 2
    elif name == "rotary base":
        model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    elif name == "attention":
        model.set_attn_implementation("sdpa")
    elif name == "dtype":
        model = model.to(torch.bfloat16)
    elif name == "dtype of one weight":
        norm = model.model.norm.weight
        norm.requires_grad_(False)
        norm.data = norm.data.view(torch.int32)  # the same bytes
    elif name == "shape":
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.view(weight.shape[1], weight.shape[0])
    elif name == "another family":
        model = tiny_model("mistral", sliding_window=None)
    return model


@pytest.mark.parametrize(
    "name",
    ["configuration", "rotary base", "attention", "dtype", "dtype of one weight", "shape", "another family"],
)
def test_what_else_counts(name):
    assert model_digest(_changed(name)) != model_digest(tiny_model())


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_versions_count(library, monkeypatch):
    before = model_digest(tiny_model())
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    assert model_digest(tiny_model()) != before


def test_our_attention_is_that_of_transformers():
    """A model that has once run packed keeps our attention function, which is its own where nothing is packed."""
    model = tiny_model()
    before = model_digest(model)
    model.set_attn_implementation("selfaug_eager")
    assert model_digest(model) == before


def test_surroundings_count():
    cpu = torch.device("cpu")
    digests = {"plain": place_digest("a", cpu), "model": place_digest("b", cpu)}
    digests["device"] = place_digest("a", torch.device("cuda"))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            digests[str(dtype)] = place_digest("a", cpu)
    torch.set_default_dtype(torch.bfloat16)
    digests["default dtype"] = place_digest("a", cpu)
    torch.set_default_dtype(torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    digests["products"] = place_digest("a", cpu)
    torch.set_float32_matmul_precision(precision)
    assert len(set(digests.values())) == len(digests)
    assert place_digest("a", cpu) == digests["plain"]
    with torch.autocast("cpu", torch.float16, enabled=False):
        assert place_digest("a", cpu) == digests["plain"]
    assert place_digest("a", torch.device("cuda:1")) == digests["device"]


def test_looking_at_the_bytes_leaves_a_tensor_resizable():
    """FSDP frees gathered weights by resizing their storage."""
    tensor = torch.arange(3.0)
    assert bytes(tensor_bytes(tensor)) == b"\0\0\0\0\0\0\x80?\0\0\0@"
    assert len(tensor_bytes(torch.zeros(0))) == 0
    tensor.untyped_storage().resize_(0)
