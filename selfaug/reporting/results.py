"""results.json: what every run ends with, and all that the report reads.

The file is written in one piece or not at all, so a run that was killed leaves either no results or whole ones.
It holds numbers and answers, no secrets of the config and nothing about who ran it on which machine.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import selfaug
from selfaug.errors import UserError

SCHEMA_VERSION = 1

# One metric: {"base": {...}, "tuned": {...}, "difference": {...}}, each {mean, low, high, n}, and what single items
# contributed (see evaluation/items.py). What was not measured is left out or None. An `evaluation.statistics.Interval`
# may stand for the inner dictionary until it is written.
Metric = dict[str, Any]


@dataclass
class Results:
    """One run. Scores are fractions (0..1, the CRAG score -1..1), KL in nats per token, times in seconds."""

    name: str
    config: dict[str, Any]
    """The resolved configuration. Secrets are masked when it is written."""
    config_hash: str
    seed: int
    code: dict[str, Any]
    """As `code_version` returns it."""
    data: dict[str, Any]
    """{fingerprint, counts: split -> examples, truncation: split -> what was cut, by kind}"""
    task: dict[str, Metric]
    """exact_match, f1, crag_score, correct, missing, incorrect -> Metric"""
    drift: dict[str, dict[str, Metric]]
    """corpus -> kl_base_tuned, kl_tuned_base, perplexity, perplexity_ratio -> Metric (a KL has only "tuned")"""
    time: dict[str, float | None]
    """{fit_s: of the steps, prepare_s and reference_s: before the first one (what the method measures; filling the
    cache), evaluate_s, total_s}. What several runs share is in none: the writing of self-dialogues and targets."""
    speed: dict[str, float | None]
    """{train_tokens_per_s}"""
    memory: dict[str, int | None]
    """{peak_bytes}"""
    environment: dict[str, Any]
    """As `environment` returns it."""
    retention: dict[str, dict[str, Metric]] = field(default_factory=dict)
    """benchmark -> metric -> Metric, which here has also retention (tuned / base), mcnemar_p, at_floor and main"""
    retention_mean: Metric = field(default_factory=dict)
    """{"retention": mean over the benchmarks that are not at their floor}"""
    style: dict[str, dict[str, Metric]] = field(default_factory=dict)
    """prompts -> words, one_line, refusal, repetition, empty -> Metric"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Of each benchmark the settings, template, versions and seconds; the items are in the run's evaluation folder"""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """[{id, question, documents?, answers, base, tuned}]"""
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    """metric of metrics.csv -> [[step, value], ...]; see reporting/curves.py"""
    token_kl: dict[str, Any] = field(default_factory=dict)
    """One example of the test split, token by token; see evaluation/token_kl.py"""
    status: str = "finished"
    schema_version: int = SCHEMA_VERSION


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write the file atomically: another process sees the old file or the new one, never a half."""
    path = Path(path)
    content = {key.name: _json_value(getattr(results, key.name), key.name) for key in dataclasses.fields(results)}
    content["config"] = mask_secrets(content["config"])
    # Before any file is touched, so that a value that is not JSON leaves the old file alone.
    text = _text(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # errors: a lone surrogate in a generated answer must not cost the run its results.
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# Long lists of small numbers: a line each, or the file would be mostly line breaks.
_ON_ONE_LINE = frozenset({"curves", "token_kl"})
# A list of numbers that was broken into lines; no string of JSON holds a line break.
_NUMBERS = re.compile(r"\[\n[-+\d.eE,\snul]+\]")


def _text(content: dict[str, Any]) -> str:
    """The file's JSON."""
    lines = []
    for key, value in content.items():
        indent = None if key in _ON_ONE_LINE else 2
        written = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")
        written = _NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", written)
        lines.append(f'  "{key}": {written}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read what `write_results` wrote. Keys that this version does not know are passed over."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # a lone surrogate, which could be written to no terminal and no file
            content = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file, so finish the run that should have written it.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), so check the path and its permissions.") from error
    except ValueError as error:  # bad JSON and bad UTF-8
        raise UserError(f"{path}: not whole JSON ({error}), so delete the file and run that job again.") from error
    if not isinstance(content, dict) or "schema_version" not in content:
        raise UserError(f"{path}: not a results file of selfaug (schema_version is missing), so point to another one.")
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r} and this selfaug reads {SCHEMA_VERSION}, "
            "so use the selfaug that wrote it or run the job again."
        )
    for key in dataclasses.fields(Results):
        required = key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING
        if key.name not in content and not required:
            continue
        kind = _KINDS.get(key.name, dict)
        if not isinstance(content.get(key.name), kind):
            raise UserError(
                f"{path}: {key.name!r} is missing or no {_KIND_NAMES[kind]}, so delete the file and run that job again."
            )
    return Results(**{key.name: content[key.name] for key in dataclasses.fields(Results) if key.name in content})


_KINDS: dict[str, type] = dict.fromkeys(("name", "config_hash", "status"), str)
_KINDS |= {"seed": int, "schema_version": int, "samples": list}
_KIND_NAMES: dict[type, str] = {str: "string", int: "whole number", list: "list", dict: "object"}


def _json_value(value: Any, where: str) -> Any:
    """The value in JSON's types; NaN and infinity, which JSON does not have, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _json_value(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner, f"{where}.{index}") for index, inner in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)):  # numpy and torch scalars, without importing either
        return _json_value(value.item(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which results.json cannot hold")


# ---------------------------------------------------------------------------------------------------------------------
# Secrets

MASK = "***"
_ALWAYS_SECRET = re.compile(r"secret|passw(or)?d|passphrase|credential|(api|access|private)_?key", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SPECIAL_TOKENS = frozenset({"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "special", "image"})
_ASSIGNMENT = re.compile(r"\s*([+~]*[\w./@-]+)\s*=\s*(.*)", re.DOTALL)
_NUMBER_OR_FLAG = re.compile(r"[\d.,_eE+-]*|true|false|null", re.IGNORECASE)


def mask_secrets(config: Any) -> Any:
    """A copy with the values of secret keys replaced by "***".

    Secret is what is called secret, password, credential, api_key, access_key or private_key, and every *text* that
    is called token: `hf_token` is one, `max_tokens: 4096`, `tokens: input`, `tokenizer` and `pad_token` are settings a
    reader needs.
    Command line overrides kept as strings ("logger.api_key=abc") are masked too.
    """
    return _masked(config, "", secret=False, token=False)


def _masked(value: Any, key: str, *, secret: bool, token: bool) -> Any:
    secret = secret or bool(_ALWAYS_SECRET.search(key))
    token = token or _names_a_token(key)
    if isinstance(value, dict):
        return {inner: _masked(item, str(inner), secret=secret, token=token) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(item, "", secret=secret, token=token) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if secret or (token and isinstance(value, str)):
        return MASK
    if isinstance(value, str) and (assignment := _ASSIGNMENT.match(value)):
        name, text = assignment.groups()
        names_token = _names_a_token(name.rpartition(".")[2]) and not _NUMBER_OR_FLAG.fullmatch(text.strip())
        if _ALWAYS_SECRET.search(name) or names_token:
            return f"{name}={MASK}"
    return value


def _names_a_token(key: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(key)]
    if words == ["tokens"]:  # those at which hidden states are aligned
        return False
    return any(word.endswith(("token", "tokens")) for word in words) and not _SPECIAL_TOKENS.intersection(words)


# ---------------------------------------------------------------------------------------------------------------------
# Where the numbers come from


def code_version() -> dict[str, Any]:
    """{version, commit, dirty}: commit and dirty are None where the code does not run from its git checkout."""
    package = Path(selfaug.__file__).resolve().parent
    commit = dirty = None
    # A wheel inside somebody else's repository must not report that repository's commit.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package, "rev-parse", "--verify", "HEAD")
    if commit is not None:
        changes = _git(package, "status", "--porcelain", "--", ".")
        dirty = None if changes is None else bool(changes)
    return {"version": selfaug.__version__, "commit": commit, "dirty": dirty}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no answer."""
    # Git hooks set GIT_DIR and friends, which would point to another repository.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=variables, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str | None = None, precision: str | None = None) -> dict[str, Any]:
    """Versions and hardware kind: no user, host, path or environment variable.

    `device` is the accelerator's name (from torch.cuda.get_device_name, say), passed in so that reading a report
    does not import torch. `precision` is what `trainer.precision=auto` has come to there.
    """
    versions = {package: _version(package) for package in ("torch", "transformers", "peft", "lightning")}
    # What this process may use: in a container os.cpu_count() is the machine's.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions,
        "device": device or "cpu",
        "cpu_count": cpus,
        "precision": precision,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
