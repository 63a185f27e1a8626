"""Objects from nodes of the configuration, with errors that name the setting."""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from selfaug.errors import UserError


def plain(node: Any) -> dict[str, Any]:
    """A node of the configuration as a dictionary, interpolations resolved."""
    content: Any = OmegaConf.to_container(node, resolve=True)
    return content


def make(node: Any, where: str) -> Any:
    """hydra.utils.instantiate. where: the folder of selfaug/conf in which there are such nodes."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        reason = _innermost(error).rstrip(".")
        raise UserError(f"{where} does not fit together: {reason}; see selfaug/conf/{where}.") from error


def make_named(node: Any, setting: str) -> Any:
    """hydra.utils.instantiate of the class, perhaps of the user's own, that `setting` names."""
    target = node.get("_target_") if OmegaConf.is_dict(node) else None
    if not isinstance(target, str):
        raise UserError(f"{setting} names no class: give it a _target_, as the files in selfaug/conf/method do.")
    try:
        made_of = _find(target)
    except Exception as error:  # importing a file can fail in any way
        folder = "" if target.startswith("selfaug.") else ", or start the command in the folder that has its file"
        raise UserError(
            f"{setting}._target_={target} cannot be imported ({_innermost(error)}): correct it{folder}."
        ) from error
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = _innermost(error).rstrip(".")
        accepted = _accepted(made_of, node) if "unexpected keyword argument" in reason else ""
        raise UserError(f"{setting}: {reason}{accepted}.") from error


def call(function: Any, where: str, **arguments: Any) -> Any:
    """function(**arguments), where a key that it does not know is the user's typo."""
    try:
        return function(**arguments)
    except TypeError as error:
        reason = str(error).rpartition(")")[2].strip() or str(error)
        raise UserError(f"{where}: {reason}; see selfaug/conf/{where}.") from error


def _find(target: str) -> Any:
    """What a dotted name stands for. Raises what importing its module raises, also where that is not its own fault."""
    path, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(path), name)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # the module is there, and misses another one
            raise
        return pkgutil.resolve_name(target)  # a class within a class


def _innermost(error: BaseException) -> str:
    """Hydra says first that it could not, and only the causes say why."""
    while isinstance(error, (InstantiationException, ImportError)) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).split("\n")[0] or type(error).__name__


def _accepted(made_of: Any, node: Any) -> str:
    """'; did you mean X' or '; it takes X, Y' for keys that the class does not know, else nothing."""
    try:
        known = list(inspect.signature(made_of).parameters)
    except (TypeError, ValueError):
        return ""
    unknown = [str(key) for key in node if not str(key).startswith("_") and key not in known]
    if not unknown or not known:
        return ""
    near = difflib.get_close_matches(unknown[0], known, n=1)
    return f"; did you mean {near[0]}" if near else f"; it takes {', '.join(known)}"
