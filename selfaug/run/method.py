"""What a method is made of, from `method` in the configuration: its terms, token weights and `learn`.

The classes may be the user's own, so that every error names the setting that it is about.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfaug.errors import UserError
from selfaug.objective import HiddenAlignment
from selfaug.run.make import make_named

log = logging.getLogger(__name__)

_PARTS = ("terms", "weights", "learn")
_PAGE = "see 'Your own method' in docs/methods.md"


def term_nodes(config: DictConfig) -> dict[str, Any]:
    """The settings of the method's terms by name, but for those that are left out."""
    found = config.method.get("terms") or {}
    if not isinstance(found, Mapping) and not OmegaConf.is_dict(found):
        raise UserError(f"method.terms={found} is not allowed: give each term a name; {_PAGE}.")
    nodes = {str(name): node for name, node in found.items() if node is not None}
    # alignment=none: plain fine-tuning as a row of an ablation
    return {k: v for k, v in nodes.items() if not (OmegaConf.is_dict(v) and v.get("position") == "none")}


def terms(config: DictConfig) -> dict[str, Any]:
    """The terms of the objective by name.

    Raises UserError for a class that cannot be made or is no term, and for a key of `method` that is one misspelt.
    """
    for key, value in config.method.items():
        # Others are the method's own, for interpolations (method.ratio).
        if key not in _PARTS and OmegaConf.is_config(value) and (near := get_close_matches(str(key), _PARTS)):
            raise UserError(f"method.{key} would do nothing: did you mean method.{near[0]}?")
    found = {}
    for name, node in term_nodes(config).items():
        setting = f"method.terms.{name}"
        try:
            term = make_named(node, setting)
        except UserError as error:
            # LogitAlignment calls its settings alignment.X, where most of them come from.
            if OmegaConf.is_interpolation(config.method.terms, name) or not str(error).startswith("alignment."):
                raise
            raise UserError(str(error).replace("alignment.", f"{setting}.")) from error
        _needs(term, setting, "a term", *_of_a_term(term))
        if (schedule := getattr(term, "schedule", None)) is not None:
            _needs(schedule, f"{setting}.schedule", "a schedule", "alpha")
        called = "hidden" if name == "kl" and isinstance(term, HiddenAlignment) else name
        if called in found:
            raise UserError(
                f"method.terms.{called} and the alignment of hidden states have one name: rename the first."
            )
        found[called] = term
    return found


def check_alignment_is_used(config: DictConfig, overrides: Sequence[str]) -> None:
    """Settings of `alignment` do nothing where no term is made of it.

    overrides: those of the command line. Raises UserError where the method has an alignment of its own, which they may
    have been meant for; else it is said in the log, as sweeps over methods set them for those that have one.
    """
    given = [one for one in overrides if re.match(r"[+~]*alignment(?:/\w+)*[.=@]", one)]
    if not given or "${alignment" in str(OmegaConf.to_container(config.method, resolve=False)):
        return
    name = config.method.get("name")
    if own := [term for term, node in term_nodes(config).items() if OmegaConf.is_dict(node) and "position" in node]:
        raise UserError(
            f"{given[0]} would do nothing with method={name}, whose alignment is its own: set "
            f"method.terms.{own[0]}.alpha (or another setting of it) instead."
        )
    log.warning("%s does nothing with method=%s, which has no alignment", given[0], name)


def weights(config: DictConfig) -> Any:
    """How much each response token counts; None where all count alike."""
    if not config.method.get("weights"):
        return None
    made = make_named(config.method.weights, "method.weights")
    _needs(made, "method.weights", "a choice of weights", "__call__")
    return made


def learn(config: DictConfig) -> Any:
    """Which response tokens are learned; None for all."""
    if not config.method.get("learn"):
        return None
    made = make_named(config.method.learn, "method.learn")
    _needs(made, "method.learn", "a choice of tokens", "prepare", "use")
    return made


def _of_a_term(term: Any) -> tuple[str, ...]:
    if hasattr(term, "penalty"):
        return ("alpha",)
    return ("alpha", "schedule", "sampling", "select", "compare" if isinstance(term, HiddenAlignment) else "total")


def _needs(made: Any, setting: str, what: str, *names: str) -> None:
    if missing := [name for name in names if not hasattr(made, name)]:
        raise UserError(f"{setting} ({type(made).__name__}) is not {what}: it has no {', no '.join(missing)}; {_PAGE}.")
