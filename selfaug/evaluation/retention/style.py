"""Style: how a model answers, whatever it says.

Fine-tuning on short answers shortens all answers long before a benchmark notices. Of each free answer:

    words       how many
    one_line    1 if it is a single line, else 0
    refusal     1 if it opens by declining, else 0 (by a list of English phrases: a hint, not a judgement)
    repetition  share of its four-word sequences that it has used before (0 where it has fewer than five words)
    empty       1 if there is no text at all
"""

import re

METRICS = ("words", "one_line", "refusal", "repetition", "empty")

_REFUSAL = re.compile(
    r"^(i'?m|i am) (sorry|afraid|unable|not able)\b|^(sorry|unfortunately)\b|\bi (can'?t|cannot|can not|am unable to) "
    r"(help|assist|answer|provide|do|write|create|generate|give|comply|fulfil|fulfill|access|tell|say|share with)\b|"
    r"\bas an ai\b|\bi (don'?t|do not) have (access|the ability|personal|enough)\b|^no,? i (can'?t|cannot)\b"
)
_OPENING = 120  # characters in which a refusal says so
_GRAM = 4


def style(text: str) -> dict[str, float]:
    """The metrics of one answer."""
    words = text.split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return {
        "words": float(len(words)),
        "one_line": float(len([line for line in text.splitlines() if line.strip()]) == 1),
        "refusal": float(bool(_REFUSAL.search(text.strip().lower().replace("’", "'")[:_OPENING]))),
        "repetition": 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0,
        "empty": float(not words),
    }
