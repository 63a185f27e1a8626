"""How self-dialogues are written: every setting that changes what is written, and nothing else."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from selfaug.data.packaged import unmeasured_instructions
from selfaug.data.sources.dialogues import JsonlDialogues
from selfaug.data.text import check_file, hash_sources, read_lines
from selfaug.errors import UserError

Recipe = Literal["seedless", "bait", "prompts"]
VERSION = 2  # raise it when the same settings would give other dialogues
_GROUP = "self_dialogues"


@dataclass(frozen=True)
class Filters:
    """What is left out; nothing by default, as SA-SFT publishes it.

    min_words, max_words: of every answer. duplicates: of the first user text, exact (but for case and white space) or
    near: its three-word sequences overlap with an earlier one's by `similarity` (Jaccard). refusals: dialogues with an
    answer that declines, by a list of English phrases. language: keep only this one (a code such as en).
    """

    min_words: int | None = None
    max_words: int | None = None
    duplicates: Literal["exact", "near"] | None = None
    similarity: float = 0.7
    refusals: bool = False
    language: str | None = None

    def __post_init__(self) -> None:
        if self.duplicates not in (None, "exact", "near"):
            raise UserError(f"{_GROUP}.filters.duplicates={self.duplicates} is unknown: set it to exact, near or null.")
        if not 0 < self.similarity <= 1:
            raise UserError(f"{_GROUP}.filters.similarity={self.similarity} is not allowed: set it above 0, at most 1.")


@dataclass(frozen=True)
class Settings:
    """recipe: where the first user text comes from. seedless: sampled behind the chat template up to the user's turn
        (Magpie, Xu et al. 2406.08464); bait: the model is asked for one with the prompt `bait`; prompts: from a list,
        in a seeded order, again and again.
    prompts: the list, a .txt file with one a line, or .jsonl as in selfaug/data/sources/dialogues.py, whose first user
        texts are taken; None for the packaged instructions.
    turns: of user and assistant; every further user text is sampled as seedless does.
    temperature, top_p: of the user texts; answer_temperature, answer_top_p: of the answers. Temperature 0 is greedy.
    max_user_tokens: a user text that does not end by then is no question: the turn is left out. max_answer_tokens: an
        answer that does not end by then is cut, and is the last one.
    batch_size: dialogues that are written together; in bfloat16 it moves roundings.
    chat_template, template_arguments: as in data.prompt.
    """

    recipe: Recipe = "seedless"
    prompts: str | None = None
    bait: str = "Write one question or request that a person might send to an assistant. Reply with its text alone."
    turns: int = 1
    temperature: float = 0.7
    top_p: float = 0.9
    answer_temperature: float = 0.7
    answer_top_p: float = 0.9
    max_user_tokens: int = 128
    max_answer_tokens: int = 384
    batch_size: int = 64
    seed: int = 0
    filters: Filters = field(default_factory=Filters)
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_arguments", dict(self.template_arguments or {}))
        if self.recipe not in get_args(Recipe):
            raise UserError(
                f"{_GROUP}.recipe={self.recipe} is unknown: set it to one of {', '.join(get_args(Recipe))}."
            )
        if not isinstance(self.filters, Filters):
            filters: Mapping[str, Any] = self.filters or {}
            if unknown := set(filters) - set(Filters.__dataclass_fields__):
                raise UserError(
                    f"{_GROUP}.filters.{min(map(str, unknown))} is unknown: there are "
                    f"{', '.join(Filters.__dataclass_fields__)}."
                )
            object.__setattr__(self, "filters", Filters(**filters))
        for name in ("turns", "max_user_tokens", "max_answer_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{_GROUP}.{name}={value} is not allowed: set it to a positive number.")
        for name in ("temperature", "answer_temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"{_GROUP}.{name}={getattr(self, name)} is not allowed: set it to 0 or more.")
        for name in ("top_p", "answer_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{_GROUP}.{name}={getattr(self, name)} is not allowed: set it above 0, at most 1.")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"{_GROUP}.seed={self.seed} is not allowed: set it to 0 or a positive number.")
        if self.prompts is not None and self.recipe != "prompts":
            raise UserError(f"{_GROUP}.prompts is only used by {_GROUP}.recipe=prompts: set that with it.")
        if self.prompts is not None:
            path = Path(self.prompts).expanduser()
            check_file(path, f"{_GROUP}.prompts={path} does not exist: set it to a .txt or .jsonl file.")

    def fingerprint(self, model: str) -> str:
        """12 hex digits of all that changes what is written by the model that `model` stands for, and how fast."""
        own = asdict(self)
        files = {}
        if self.prompts is not None:
            own["prompts"] = "file"
            files = {"prompts": Path(self.prompts).expanduser()}
        elif self.recipe == "prompts":
            own["prompts"] = self.seeds()
        return hash_sources("self-dialogues", VERSION, {**own, "model": model}, files)[:12]

    def seeds(self) -> list[str]:
        """The seed prompts of recipe=prompts, in the order of their file."""
        if self.prompts is None:
            return [prompt for prompt, _ in unmeasured_instructions()]
        path = Path(self.prompts).expanduser()
        if path.name.removesuffix(".gz").removesuffix(".bz2").endswith(".txt"):
            found = [line.decode("utf-8", "replace") for _, line in read_lines(path)]
        else:
            users = ([m for m in one.messages if m["role"] == "user"] for one in JsonlDialogues(path).dialogues())
            found = [messages[0]["content"].strip() for messages in users if messages]
        if not any(found):
            raise UserError(f"{_GROUP}.prompts={path} has no prompt: set it to a file with one a line.")
        return [prompt for prompt in found if prompt]
