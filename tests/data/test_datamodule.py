"""The data module's settings: limits, packing, and the steps that come of them."""

import re
from itertools import chain

import pytest

from selfaug.data.datamodule import RagDataModule
from selfaug.data.prompt import PromptConfig
from selfaug.data.schema import SPLITS, Document, Example
from selfaug.errors import UserError
from tests.tiny import tiny_tokenizer


class Numbered:
    """30 examples to train on and 7 to validate with, the longer the later."""

    def fingerprint(self):
        return "numbered"

    def examples(self, split, count_tokens):
        for i in range(dict(zip(SPLITS, (30, 7, 0), strict=True))[split]):
            yield Example(f"{split}-{i}", f"Which is {i}?", (str(i),), (Document("word " * (i + 1)),))


def module(tmp_path, **settings):
    settings = {"batch_size": 8, **settings}
    return RagDataModule(Numbered(), tiny_tokenizer(), PromptConfig(), cache=tmp_path, progress=False, **settings)


def batches(loader):
    return list(chain.from_iterable(step.micro_batches for step in loader))


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_size": 3}, {"micro_batch_tokens": 600}, {"packing": True, "micro_batch_tokens": 600}],
    ids=str,
)
def test_every_example_is_in_one_micro_batch_within_the_limits(tmp_path, settings):
    data = module(tmp_path, **settings)
    for loader, steps, names in (
        (data.train_dataloader(), 4, [f"train-{i}" for i in range(30)]),
        (data.val_dataloader(), 1, [f"val-{i}" for i in range(7)]),
    ):
        assert len(loader) == len(list(loader)) == steps
        found = batches(loader)
        assert sorted(chain.from_iterable(b.ids for b in found)) == sorted(names)
        for batch in found:
            assert batch.packed == settings.get("packing", False)
            assert len(batch.ids) <= settings.get("micro_batch_size", 8)
            assert batch.input_ids.numel() <= settings.get("micro_batch_tokens", 2048)
            assert len(batch.keys) == len(batch.spans) == len(batch.ids)
            assert (batch.documents > 0).any()
            if batch.packed:
                assert batch.attention_mask.all()


def test_packing_and_limits_leave_the_steps_as_they_are(tmp_path):
    def steps(**settings):
        loader = module(tmp_path, **settings).train_dataloader()
        return [sorted(chain.from_iterable(b.ids for b in step.micro_batches)) for step in loader]

    expected = steps()
    assert steps(packing=True) == steps(micro_batch_size=1) == steps(micro_batch_tokens=None) == expected
    data = module(tmp_path, packing=True)
    data.load_state_dict({"steps_done": 2})  # resumed within the epoch
    found = [sorted(chain.from_iterable(b.ids for b in step.micro_batches)) for step in data.train_dataloader()]
    assert found == expected[2:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0 is not allowed: set it to at least 1."),
        ({"micro_batch_size": 0}, "data.micro_batch_size=0 is not allowed: set it to at least 1, or to null for no "),
        ({"micro_batch_tokens": -1}, "data.micro_batch_tokens=-1 is not allowed: set it to at least 1, or to null for"),
        ({"packing": "flash"}, "data.packing=flash is not allowed: set it to true or false."),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        module(tmp_path, **settings)
