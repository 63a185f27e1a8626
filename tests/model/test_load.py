"""Loading: where a name leads, which dtype each layer has, and one sentence for everything that can be wrong."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from selfaug.errors import UserError
from selfaug.model.load import add_adapter, load_adapter, load_base, load_tokenizer, locate
from tests.tiny import FAMILIES, TOKENIZER_VOCAB, lora_config, save_tiny, tiny_model


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


# --- names --------------------------------------------------------------------------------------------------------


def test_a_folder_is_found(tiny_folder, monkeypatch):
    assert locate(str(tiny_folder)) == str(tiny_folder)
    monkeypatch.chdir(tiny_folder.parent)
    assert locate(f"./{tiny_folder.name}") == tiny_folder.name
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert locate(f"~/{tiny_folder.name}") == str(tiny_folder)


def test_a_folder_wins_over_a_hub_name(tmp_path, tiny_folder, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model") == "owner/model"
    assert load_base("owner/model") is not None


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model\.name=\S+ is a folder without a config\.json: set it to .*\.$"):
        locate(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no", "no", "../a/b", "a/b/c", "asset"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^model\.name=\S+ does not exist: set it to a model folder, a hub name"):
        locate(name)


def test_a_hub_name_is_left_to_the_hub():
    assert locate("owner/model-1.5B") == "owner/model-1.5B"


def test_an_unknown_asset_is_refused():
    with pytest.raises(UserError, match="no asset 'smolm2-135m-instruct': did you mean 'smollm2-135m-instruct'"):
        locate("asset:smolm2-135m-instruct")


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
def test_a_hub_that_cannot_be_reached_is_one_sentence(load):
    with pytest.raises(
        UserError, match=r"^model\.name=owner/nothing is a hub model and the hub cannot be reached: .*\.$"
    ):
        load("owner/nothing")


# --- dtypes -------------------------------------------------------------------------------------------------------


def test_the_base_is_frozen_in_training_mode_and_float32(tiny_folder):
    for mixed, dtype in ((False, "auto"), (False, "float32"), (True, "float32")):
        model = load_base(str(tiny_folder), dtype=dtype, mixed=mixed)
        assert model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = load_file(tiny_folder / "model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters() if name in stored)


def test_bfloat16_is_bfloat16(tiny_folder):
    assert {p.dtype for p in load_base(str(tiny_folder), dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_an_unknown_dtype_is_refused(tiny_folder):
    with pytest.raises(
        UserError, match=r"^model\.dtype=float16 is unknown: set it to one of auto, float32, bfloat16\.$"
    ):
        load_base(str(tiny_folder), dtype="float16")


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def test_mixed_precision_stores_the_linear_layers_in_bfloat16(family_folder):
    """Embeddings, norms, biases of norms and the head stay in float32, and no logit changes by a bit."""
    mixed = load_base(str(family_folder), mixed=True)
    full = load_base(str(family_folder), dtype="float32")
    head, embedding = mixed.get_output_embeddings(), mixed.get_input_embeddings()
    linear = {m for m in mixed.modules() if isinstance(m, nn.Linear)} - {head}
    inside = {id(p) for m in linear for p in m.parameters()}
    assert len(linear) >= 8
    for name, parameter in mixed.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if id(parameter) in inside else torch.float32), name
    assert head.weight.dtype == embedding.weight.dtype == torch.float32
    assert (head.weight is embedding.weight) == bool(mixed.config.tie_word_embeddings)

    ids = torch.randint(3, TOKENIZER_VOCAB, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (model.eval()(input_ids=ids, use_cache=False).logits for model in (mixed, full))
    assert expected.abs().max() > 1
    assert torch.equal(found, expected)


def test_the_adapter_is_float32_whatever_the_base_is(tiny_folder):
    for settings in ({}, {"mixed": True}, {"dtype": "bfloat16"}):
        model = add_adapter(load_base(str(tiny_folder), **settings), lora_config())
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert len(trainable) > 0
        assert {p.dtype for p in trainable} == {torch.float32}


def test_the_attention_implementation_is_passed_on(tiny_folder):
    assert load_base(str(tiny_folder), attn_implementation="eager").config._attn_implementation == "eager"


# --- files that cannot be read --------------------------------------------------------------------------------------


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.name=\S+ has no weights in safetensors format: convert them first"):
        load_base(str(folder))


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.name=\S+ has no weights in safetensors format"):
        load_base(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 3000])
def test_a_truncated_weights_file_is_one_sentence(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"^model\.name=\S+ cannot be loaded: [^\n]*$"):
        load_base(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_a_config_that_cannot_be_read_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.name=\S+ cannot be loaded: [^\n]*$"):
        load_base(str(folder))


def test_code_from_the_model_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    with pytest.raises(UserError, match=r"^model\.name=\S+ cannot be loaded"):
        load_base(str(folder))
    assert not (folder / "ran").exists()


# --- tokenizer ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_pads_on_the_right_and_has_a_padding_token(folder):
    assert load_tokenizer(str(folder)).pad_token == "<|pad|>"
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config | {"padding_side": "left"}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


# --- adapters -------------------------------------------------------------------------------------------------------


def test_target_modules_that_do_not_fit_are_refused():
    config = LoraConfig(target_modules=["no_such_proj"], task_type="CAUSAL_LM")
    with pytest.raises(
        UserError, match=r"^adapter\.target_modules does not fit LlamaForCausalLM: .*no_such_proj"
    ) as it:
        add_adapter(tiny_model(), config)
    assert "\n" not in str(it.value)


def test_a_folder_without_an_adapter_is_refused(tiny_folder, tmp_path):
    for place in (tiny_folder, tmp_path / "nowhere", str(tmp_path)):
        with pytest.raises(
            UserError, match=r"holds no PEFT adapter \(adapter_config\.json\): set target to an adapter"
        ):
            load_adapter(tiny_model(), place)


def test_a_saved_adapter_comes_back_frozen(tmp_path):
    saved = tiny_model(lora=True)
    saved.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits)


def test_an_adapter_without_weights_is_one_sentence(tmp_path):
    tiny_model(lora=True).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"set target to an adapter saved as safetensors"):
        load_adapter(tiny_model(), tmp_path)


def test_pickled_adapter_weights_are_refused(tmp_path):
    tiny_model(lora=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_adapter(tiny_model(), tmp_path)
