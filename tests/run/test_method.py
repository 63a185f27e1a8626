"""A method of one's own: what is wrong with it is said of the setting that it stands in."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from selfaug.errors import UserError
from selfaug.objective import LogitAlignment, Objective
from selfaug.run import build, method
from tests.objective.test_objective import make_batch, run
from tests.tiny import tiny_model

HERE = "tests.run.test_method"
KL = "selfaug.objective.LogitAlignment"


@dataclass
class L1:
    """A penalty and nothing else."""

    alpha: float = 0.1

    def penalty(self, model: Any) -> torch.Tensor:
        return torch.stack([p.abs().sum() for p in model.parameters()]).sum()


@dataclass
class Nothing:
    alpha: float = 0.1


class Rows(LogitAlignment):
    def total(self, states: Any, head: Any) -> torch.Tensor:
        return states.tuned.sum(-1)


class Refuses:
    def __init__(self, alpha: float = 0, file: str | None = None, **others: Any):
        if file:
            Path(file).read_text()
        raise ValueError("alpha is too large")


def config(**parts: Any) -> Any:
    return OmegaConf.create({"method": {"name": "mine", **parts}, "alignment": {"_target_": KL, "alpha": 0.5}})


def test_a_method_needs_no_terms():
    assert method.terms(config()) == {}
    assert method.terms(config(terms=None)) == {}
    assert method.terms(config(terms={"kl": None, "off": {"_target_": KL, "position": "none"}})) == {}
    assert method.weights(config()) is None
    assert method.learn(config()) is None


def test_a_number_of_its_own_is_no_mistake():
    l1 = {"_target_": f"{HERE}.L1", "alpha": "${method.shared.alpha}"}
    assert method.terms(config(ratio=0.5, shared={"alpha": 0.5}, terms={"l1": l1})) == {"l1": L1(0.5)}


def test_settings_of_an_alignment_that_nothing_is_made_of(caplog):
    own = config(terms={"mine": {"_target_": KL, "alpha": 0.1, "position": "output_logits"}})
    for given in ("alignment.alpha=0.1", "alignment=none", "alignment/schedule=linear", "+alignment.tokens=all"):
        with pytest.raises(
            UserError, match=rf"^{re.escape(given)} would do nothing .*: set method\.terms\.mine\.alpha"
        ):
            method.check_alignment_is_used(own, ["seed=2", given])
    method.check_alignment_is_used(own, ["seed=2", "+data.alignment.alpha=1", "method=alignment"])
    method.check_alignment_is_used(config(terms={"kl": "${alignment}"}), ["alignment.alpha=0.1"])
    method.check_alignment_is_used(config(terms={"kl": {"_target_": KL, "alpha": "${alignment.alpha}"}}),
                                   ["alignment.alpha=0.1"])  # fmt: skip
    assert not caplog.records
    # In a sweep over methods it is meant for others.
    method.check_alignment_is_used(config(terms={}), ["alignment.alpha=0.1"])
    assert "alignment.alpha=0.1 does nothing with method=mine" in caplog.text


def test_the_earlier_adapter_of_o_lora_belongs_to_the_data(tmp_path):
    term = {"_target_": "selfaug.objective.OLoRA", "adapter": str(tmp_path)}
    of = config(terms={"o_lora": term})
    assert build.with_method_texts(of, "data") == "data"  # there is none, which is said when it is to be read
    found = set()
    for content in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        found.add(build.with_method_texts(of, "data"))
    assert len(found | {"data"}) == 3


def test_two_terms_of_one_name():
    hidden = {"_target_": "selfaug.objective.HiddenAlignment", "position": "feed_forward"}
    assert set(method.terms(config(terms={"kl": hidden}))) == {"hidden"}
    with pytest.raises(UserError, match=r"method\.terms\.hidden and the alignment of hidden states have one name"):
        method.terms(config(terms={"hidden": {"_target_": f"{HERE}.L1"}, "kl": hidden}))


def test_a_penalty_needs_no_start():
    model = tiny_model()
    objective = Objective({"l1": L1()})
    objective.start(model)
    total, found = objective.penalties(model)
    assert total == 0.1 * found["l1"] > 0


def test_what_a_class_returns_has_the_right_shape():
    model, batch = tiny_model(), make_batch()
    vector = Objective({"l1": L1()})
    vector.parameter_terms["l1"].penalty = lambda model: torch.ones(3)
    with pytest.raises(
        UserError, match=r"penalty of the term l1 is a tensor of shape \[3\]: return a tensor of one number"
    ):
        vector.penalties(model)
    vector.parameter_terms["l1"].penalty = lambda model: 0
    with pytest.raises(UserError, match="penalty of the term l1 is 0: return a tensor"):
        vector.penalties(model)
    for returned, said in ((lambda nll: nll.mean(), r"a tensor of shape \[\]"), (lambda nll: 0.5, "0.5")):
        with pytest.raises(UserError, match=rf"^method\.weights \(function\) gives {said} for \d+ tokens: return"):
            run(Objective(weights=lambda nll, hidden, head, returned=returned: returned(nll)), model, [batch])
    rows = Objective({"kl": Rows()})
    with pytest.raises(UserError, match=r"^The total of the term kl is a tensor of shape \[\d+\]"):
        run(rows, model, [batch])


def test_a_module_that_misses_another_says_which(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"_target_=mine\.keep\.X cannot be imported \(No module named 'surely_not_installed'"
    ):
        method.terms(config(**terms(_target_="mine.keep.X")))


def terms(**term: Any) -> dict[str, Any]:
    return {"terms": {"a": term}}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"wieghts": {"_target_": "x.Y"}},
            "method.wieghts would do nothing: did you mean method.weights?",
        ),
        ({"terms": [{"_target_": KL}]}, "is not allowed: give each term a name"),
        ({"terms": {"a": 0.5}}, "method.terms.a names no class: give it a _target_"),
        ({"terms": {"a": [1]}}, "method.terms.a names no class: give it a _target_"),
        ({"learn": [1]}, "method.learn names no class: give it a _target_"),
        (terms(alpha=1), "method.terms.a names no class: give it a _target_"),
        (
            terms(_target_="nowhere.X"),
            "method.terms.a._target_=nowhere.X cannot be imported (No module named 'nowhere')",
        ),
        (
            terms(_target_=f"{HERE}.L2"),
            "module 'tests.run.test_method' has no attribute 'L2'): correct it, or start the",
        ),
        (terms(_target_=f"{HERE}.L1", alhpa=1), "got an unexpected keyword argument 'alhpa'; did you mean alpha."),
        (terms(_target_=f"{HERE}.L1", share=1), "got an unexpected keyword argument 'share'; it takes alpha."),
        (terms(_target_=f"{HERE}.Nothing"), "method.terms.a (Nothing) is not a term: it has no schedule, no sampling"),
        (terms(_target_="alignment.Nope"), "method.terms.a._target_=alignment.Nope cannot be imported"),
        (terms(_target_=f"{HERE}.Refuses", alpha=2), "method.terms.a: alpha is too large."),
        (
            terms(_target_=f"{HERE}.Refuses", file="gone"),
            "method.terms.a: [Errno 2] No such file or directory: 'gone'.",
        ),
        (terms(_target_=KL, alpha="half"), "method.terms.a.alpha=half"),
        (terms(_target_=KL, schedule="linear"), "method.terms.a.schedule (str) is not a schedule: it has no alpha"),
        (terms(_target_="selfaug.objective.EWC", text="mine.txt"), "text=mine.txt of EWC"),
        ({"terms": {"kl": "${alignment}"}}, "alignment.alpha=-1"),
        ({"weights": {"_target_": f"{HERE}.Nothing"}}, "method.weights (Nothing) is not a choice of weights"),
        (
            {"learn": {"_target_": f"{HERE}.Nothing"}},
            "method.learn (Nothing) is not a choice of tokens: it has no",
        ),
    ],
)
def test_what_is_wrong_is_said_of_its_setting(parts: dict[str, Any], said: str):
    wrong = config(**parts)
    wrong.alignment.alpha = -1
    with pytest.raises(UserError) as error:
        [read(wrong) for read in (method.terms, method.weights, method.learn)]
    assert said in str(error.value)
    assert "method.terms.a.method" not in str(error.value)
