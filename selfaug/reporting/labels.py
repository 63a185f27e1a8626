"""What a run is called: the settings in which it differs from the others.

Plain LoRA is what the others are compared with. It may have been asked for in several ways (method=lora,
alignment=none, alpha 0, which gives the same weights bit for bit); all of them are one row and have one name.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from selfaug.reporting.cells import clean

PLAIN = "plain LoRA"

# `alignment` only feeds method.terms and `self_dialogues` data.mixture, where they are named once more.
_IGNORED_GROUPS = frozenset(
    {"alignment", "callbacks", "force", "hydra", "logger", "paths", "progress", "self_dialogues"}
)
# What belongs to a method: its data recipe too.
_METHOD = ("method.", "data.mixture", "data.batch_counts", "data.rewrite")
_IGNORED_NAMES = frozenset({"seed", "run_name", "tags", "notes", "resume", "ckpt_path", "dirpath"})
# Only at the top: a nested `name` (of a model, of a data set) is often the setting that differs.
_IGNORED_AT_TOP = frozenset({"name", "task_name", "group", "output"})
_NAME = "method.name"
# Of the method's settings these say what was done; the others are named only where these do not tell two rows apart.
_TELLING = frozenset({"alpha", "position"})
_NAMED_TOGETHER = 3


def is_plain(config: dict[str, Any]) -> bool:
    """Whether the run fine-tuned with nothing beside the NLL, on all tokens of the task's own answers alike."""
    method, data = config.get("method"), config.get("data") or {}
    if not isinstance(method, dict) or method.get("weights") or method.get("learn") or data.get("rewrite"):
        return False
    mixture = data.get("mixture") or {}
    if any(_mixes(source) for source in mixture.values()):
        return False
    terms = method.get("terms")
    if not terms:
        return method.get("name") == "lora" or bool(mixture)
    return isinstance(terms, dict) and all(_adds_nothing(term) for term in terms.values())


def _mixes(source: Any) -> bool:
    return not isinstance(source, dict) or source.get("ratio") != 0


def _adds_nothing(term: Any) -> bool:
    if not isinstance(term, dict):
        return term is None
    return term.get("position") == "none" or (term.get("alpha") == 0 and constant(term))


def constant(term: dict[str, Any]) -> bool:
    """Whether a term's alpha stays what it is; a schedule could raise it from 0."""
    schedule = term.get("schedule")
    return not schedule or (isinstance(schedule, dict) and str(schedule.get("_target_")).endswith(".Constant"))


def row_key(config: dict[str, Any]) -> str:
    """Equal for runs that differ only by the seed: they are one row."""
    return _key(settings(config), method=not is_plain(config))


def baseline_key(config: dict[str, Any]) -> str:
    """Equal for a run and the plain LoRA run that it is to be compared with: all but the method is the same."""
    return _key({k: v for k, v in settings(config).items() if not k.startswith("reference.")}, method=False)


def trained_otherwise(config: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether a run trains another kind of adapter, or none, than a plain one on the same model and data; its learning
    rate is then its own too."""
    kinds = {str((one.get("adapter") or {}).get("_target_")) for one in (config, plain)}
    rest = [
        {k: v for k, v in settings(one).items() if not k.startswith(("reference.", "adapter.", "optimizer."))}
        for one in (config, plain)
    ]
    return len(kinds) == 2 and _key(rest[0], method=False) == _key(rest[1], method=False)


def _key(flat: dict[str, Any], method: bool) -> str:
    kept = {key: value for key, value in flat.items() if method or not _of_method(key)}
    return json.dumps(kept, sort_keys=True, default=str)


def row_labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """As setting_labels, but plain LoRA by its name, and of a method's settings only what tells its rows apart; of the
    others, where methods differ and there is one plain LoRA, what is not as there. Empty where nothing differs."""
    labels = [""] * len(configs)
    plain = [index for index, config in enumerate(configs) if is_plain(config)]
    others = [index for index, config in enumerate(configs) if not is_plain(config)]
    baselines = {baseline_key(configs[index]) for index in plain}
    usual = settings(configs[plain[0]]) if len(baselines) == 1 else {}
    for members in (plain, others):
        flat = [settings(configs[index]) for index in members]
        rest = [{key: value for key, value in one.items() if not _of_method(key)} for one in flat]
        if members is others:
            telling = _telling([{key: value for key, value in one.items() if _of_method(key)} for one in flat])
            if usual and any(telling):
                names = [shown(one.get(_NAME)) for one in flat]
                same = {name: [one for one, own in zip(rest, names, strict=True) if own == name] for name in names}
                rest = [_unusual(one, usual, same[name]) for one, name in zip(rest, names, strict=True)]
            rest = [kept | other for kept, other in zip(telling, rest, strict=True)]
        for index, label in zip(members, _labels(rest), strict=True):
            labels[index] = label
    if plain and others:
        for index in plain:
            labels[index] = f"{PLAIN}, {labels[index]}" if labels[index] else PLAIN
        for index in others:
            labels[index] = labels[index] or _method_name(configs[index])
    return labels


def _unusual(one: dict[str, Any], usual: dict[str, Any], same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's settings those that are not as in plain LoRA. What plain LoRA does not have at all goes with the
    method, unless runs of the `same` method differ in it."""
    return {
        key: value
        for key, value in one.items()
        if (usual[key] != value if key in usual else any(other.get(key) != value for other in same))
    }


def _method_name(config: dict[str, Any]) -> str:
    """The only method beside plain LoRA: "selfaug, alpha=0.5"."""
    found = alpha_of(config)
    name = clean(config.get("method", {}).get("name") or "other", 32)
    return name if found is None else f"{name}, alpha={found:g}"


def alpha_of(config: dict[str, Any]) -> float | None:
    """alpha of a method with one term, 0 of plain LoRA; None where there is no one number."""
    if is_plain(config):
        return 0.0
    terms = (config.get("method") or {}).get("terms")
    if not isinstance(terms, dict) or len(terms) != 1:
        return None
    (term,) = terms.values()
    alpha = term.get("alpha") if isinstance(term, dict) else None
    return float(alpha) if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else None


def without_alpha(config: dict[str, Any]) -> dict[str, Any]:
    """The settings but for every alpha of the method: what the runs of one alpha curve share."""
    flat = settings(config)
    return {key: value for key, value in flat.items() if not (_of_method(key) and key.endswith(".alpha"))}


def position_of(config: dict[str, Any]) -> str | None:
    """Where a method with one term aligns; "none" for plain LoRA."""
    if is_plain(config):
        return "none"
    terms = (config.get("method") or {}).get("terms")
    if not isinstance(terms, dict) or len(terms) != 1:
        return None
    (term,) = terms.values()
    return str(term["position"]) if isinstance(term, dict) and term.get("position") else None


def _of_method(key: str) -> bool:
    return key.startswith(_METHOD)


def _telling(method: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run's settings of the method the few that tell it from the others: its name; alpha and position where
    runs of one name differ in them; then, among those that are still alike, whatever splits them best."""
    keys = sorted(dict.fromkeys(key for one in method for key in one), key=lambda key: key != _NAME)
    kept: list[dict[str, Any]] = [{} for _ in method]

    def values(key: str, members: Sequence[int]) -> dict[str, list[int]]:
        found = defaultdict(list)
        for index in members:
            found[shown(method[index][key]) if key in method[index] else ""].append(index)
        return found

    def keep(key: str, members: Sequence[int]) -> list[list[int]]:
        for index in members:
            if key in method[index]:
                kept[index][key] = method[index][key]
        return list(values(key, members).values())

    def split(members: Sequence[int]) -> None:
        # Where two split equally well, the shorter name; what is imported says the least to a reader.
        best = max(keys, key=lambda k: (len(values(k, members)), not k.endswith("_target_"), -len(k)), default="")
        if best and len(values(best, members)) > 1:
            parts = list(values(best, members).values())
            for key in keys:  # what changes together with it belongs to the name; _labels counts what is too much
                alike = not key.endswith("_target_") and list(values(key, members).values()) == parts
                if alike or key == best:
                    keep(key, members)
            for part in parts:
                split(part)

    def telling(key: str, part: Sequence[int]) -> bool:
        return (key == _NAME or key.rpartition(".")[2] in _TELLING) and len(values(key, part)) > 1

    parts: list[list[int]] = [list(range(len(method)))]
    for key in keys:
        parts = [one for part in parts for one in (keep(key, part) if telling(key, part) else [part])]
    for part in parts:
        split(part)
    return kept


# ---- settings as flat names -----------------------------------------------------------------------------------------


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The flattened settings that make a run what it is: not where it writes, how it logs or its seed."""
    flat = _flat(config)
    # An alpha that follows drift depends on when and on what the probe measures it.
    follows = any(key.endswith("schedule.signal") and value == "drift" for key, value in flat.items())

    # selfaug.evaluate's target is a run directory of one seed; what that run was is recorded beside it.
    located = isinstance(config.get("method"), dict)

    def ignored(key: str) -> bool:
        path = key.split(".")
        if located and key == "target":
            return True
        if follows and key.startswith("callbacks.retention_probe."):
            return False
        at_top = path[0] in _IGNORED_GROUPS or (len(path) == 1 and key in _IGNORED_AT_TOP)
        return at_top or path[-1] in _IGNORED_NAMES or path[-1].endswith("_dir")

    return {key: value for key, value in flat.items() if not ignored(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the items of a list are numbered."""
    if isinstance(value, dict) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def setting_labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """For each run "alpha=0.5, rows=input": the settings in which the runs differ, seeds and paths aside.

    A choice such as `model=...` sets many settings of one config group that change together: more than three of them
    are named by the shortest, and the rest counted. Empty strings where nothing differs.
    """
    return _labels([settings(config) for config in configs])


def _labels(flat: Sequence[dict[str, Any]]) -> list[str]:
    missing = object()
    together: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [shown(one[key]) if key in one else missing for one in flat]
        # Which runs share a value: settings of equal pattern change together. Those of different groups are
        # not folded, or a run that changes both alpha and the learning rate would be named by one of them.
        first: dict[Any, int] = {}
        pattern = tuple(first.setdefault(value, index) for index, value in enumerate(values))
        if any(pattern):
            together[key.partition(".")[0], pattern].append(key)

    def length(key: str) -> int:
        absent = sum(key not in one for one in flat)
        written = sum(len(shown(one[key])) for one in flat if key in one)
        return 1000 * absent + len(flat) * len(key) + written

    groups = [keys if len(keys) <= _NAMED_TOGETHER else sorted(keys, key=length) for keys in together.values()]
    short = _short_names([key for keys in groups for key in keys])
    classes = {
        key: _class_names({shown(one[key]) for one in flat if key in one}) if key.endswith("_target_") else {}
        for key in short
    }
    labels = []
    for one in flat:
        parts = []
        for keys in groups:
            present = [key for key in keys if key in one]
            named = present[:1] if len(present) > _NAMED_TOGETHER else present
            for key in named:
                value = shown(one[key])
                parts.append(_said(key, short[key], classes[key].get(value, value)))
            if len(named) < len(present):
                parts[-1] += f" (+{len(present) - 1})"
        labels.append(", ".join(parts))
    return labels


def _said(key: str, name: str, value: str) -> str:
    """Methods and classes go by their names alone."""
    return clean(value, 32) if key == _NAME or name == "_target_" else f"{name}={clean(value, 32)}"


def _class_names(targets: set[str]) -> dict[str, str]:
    """The names of classes without their modules, unless two would be called the same."""
    names = {target: target.rpartition(".")[2] for target in targets}
    return names if len(set(names.values())) == len(names) else {}


def shown(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted name cut from the left as far as it stays different from the others."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            names[key] = ".".join(parts[-count:])
            clash = any(other != key and f".{other}".endswith(f".{names[key]}") for other in keys)
            # "terms.0.weight" may lose its head, but a bare list index says nothing.
            if not clash and not names[key].split(".")[0].isdigit():
                break
    return names
