"""What was written, in a few numbers."""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from selfaug.self_dialogues.filters import question
from selfaug.self_dialogues.store import Progress


def statistics(records: Sequence[dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """Of the dialogues `records`, and of how they were written (`progress`, which may have come further).

    duplicates: share of the dialogues whose first user text an earlier one has, but for case and white space.
    cut: share of the dialogues whose last answer was cut off. dropped: by reason, of all that were tried.
    """
    texts = {role: [m["content"] for r in records for m in r["messages"] if m["role"] == role] for role in _ROLES}
    questions = Counter(question(record["messages"]) for record in records)
    return {
        "dialogues": len(records),
        "turns": _mean([sum(m["role"] == "assistant" for m in record["messages"]) for record in records]),
        "tokens": sum(record["tokens"] for record in records),
        **{f"{role}_words_mean": _mean([len(text.split()) for text in texts[role]]) for role in _ROLES},
        **{f"{role}_words_median": median([len(t.split()) for t in texts[role]] or [0]) for role in _ROLES},
        "duplicates": 1 - len(questions) / len(records) if records else 0.0,
        "cut": _mean([not record["ended"] for record in records]),
        "dropped": progress.dropped,
        "seconds": progress.seconds,
        "tokens_per_s": progress.sampled / progress.seconds if progress.seconds else None,
    }


_ROLES = ("user", "assistant")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
