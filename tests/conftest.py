"""Shared by all tests: one thread, fixed seeds, no network, tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import tiny


def pytest_configure(config: pytest.Config) -> None:
    """The one known warning of our libraries: peft 0.21 asks transformers 5.17+ under an old name."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, and the many quick tests after them, so that no process ends long after the others."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/run/", "tests/test_")))


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model() -> Callable:
    """Factory of tiny random models: tests.tiny.tiny_model(family, lora=...)."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer, as from_pretrained takes it. Shared: read it only."""
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny_llama"))
