"""Scores a generated answer against the accepted answers: exact match, token F1, and CRAG's three-way judgement.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016, section 6.1): lower case, no punctuation, no articles,
the best over all accepted answers. The CRAG score (Yang et al. 2024, section 4) gives 1 to a correct answer, 0 to
a missing one and -1 to an incorrect one, so that saying "I don't know" beats inventing an answer.

What differs from CRAG's official scorer (facebookresearch/CRAG, local_evaluation.py), and therefore from printed
CRAG scores:

* No language model judges. An answer is correct if an accepted answer stands in it word by word. A paraphrase
  ("two years" for "24 months") counts as incorrect here, and a prediction that names the accepted answer while
  denying it counts as correct. Compare scores of this module only with scores of this module.
* Predictions are cut after 75 words, not after 75 Llama-2 tokens, which keeps about a third more text.
* "I don't know" is also recognised with a typographic apostrophe or none, and as "I do not know"; an empty
  prediction is missing. The official rule is "i don't know" anywhere in the lower-cased prediction, nothing else.
* "invalid question" (CRAG's answer to a false premise) matches any prediction with the word "invalid" and no other,
  as there, but the word must stand alone: "Les Invalides" does not count.
* For a yes/no answer, the first "yes" or "no" of the prediction decides ("yes, there is no limit" says yes).

A question whose accepted answer is "I don't know" (the documents do not hold the answer) is read in two ways, on
purpose: exact match and F1 count the abstention as right (1), the CRAG score as missing (0).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from selfaug.data.text import normalise_answer
from selfaug.errors import UserError

Judgement = Literal["correct", "missing", "incorrect"]

# Points of one judgement. Their mean over questions is the CRAG score: bootstrap these for its interval.
CRAG_POINTS: dict[Judgement, float] = {"correct": 1.0, "missing": 0.0, "incorrect": -1.0}

MAX_JUDGED_WORDS = 75

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4\uff07`", "'"))
_ABSTENTIONS = ("i don't know", "i dont know", "i do not know")
_YES_NO = frozenset({"yes", "no"})


def _plain(text: str) -> str:
    """Lower case, one kind of apostrophe, single spaces: enough to look for a phrase in."""
    return " ".join(text.translate(_APOSTROPHES).lower().split())


def _normalised(text: str) -> str:
    # SQuAD strips ASCII punctuation only: without this "Fermat’s" and "Fermat's" would be different answers.
    return normalise_answer(text.translate(_APOSTROPHES))


def _says_dont_know(text: str) -> bool:
    plain = _plain(text)
    return any(phrase in plain for phrase in _ABSTENTIONS)


def is_missing(prediction: str) -> bool:
    """Whether the prediction gives no answer: it is empty, or says anywhere that it does not know."""
    return not prediction.strip() or _says_dont_know(prediction)


def _abstains_rightly(prediction: str, answer: str) -> bool:
    # An empty prediction is missing for CRAG, but it does not say "I don't know".
    return _says_dont_know(prediction) and _says_dont_know(answer)


def _exact(prediction: str, answer: str) -> float:
    if not _normalised(answer):
        # "A" or "?" normalise to nothing, which for SQuAD is what no answer at all is: these are to be given literally.
        return float(_plain(prediction) == _plain(answer))
    return float(_abstains_rightly(prediction, answer) or _normalised(prediction) == _normalised(answer))


def _f1(prediction: str, answer: str) -> float:
    if _abstains_rightly(prediction, answer):
        return 1.0
    predicted, accepted = _normalised(prediction).split(), _normalised(answer).split()
    if not accepted:
        return _exact(prediction, answer)
    if not predicted:
        return 0.0
    shared = (Counter(predicted) & Counter(accepted)).total()
    # 2PR / (P + R) with P = shared/len(predicted), R = shared/len(accepted).
    return 2 * shared / (len(predicted) + len(accepted))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the normalised accepted answers, else 0.0 (SQuAD)."""
    return max(_exact(prediction, answer) for answer in _accepted(answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The harmonic mean of token precision and recall, 0..1, of the accepted answer that fits best (SQuAD)."""
    return max(_f1(prediction, answer) for answer in _accepted(answers))


def _accepted(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise TypeError("answers is one string: pass a sequence of accepted answers")
    if not answers:
        raise ValueError("there is no accepted answer to compare with")
    return answers


def _holds(prediction: str, answer: str) -> bool:
    said, wanted = _normalised(prediction), _normalised(answer)
    if not wanted:
        # "A" or "?" normalise to nothing, which every text would hold: those must be given literally.
        return _plain(prediction) == _plain(answer)
    words = said.split()
    if ("invalid" in words) != ("invalid" in wanted.split()):
        return False
    if "invalid" in words:
        return True
    if wanted in _YES_NO:
        return next((word for word in words if word in _YES_NO), None) == wanted
    return f" {wanted} " in f" {said} "


def judge(prediction: str, answers: Sequence[str]) -> Judgement:
    """CRAG's judgement by rules (the module's docstring says how they differ from the official judge).

    In the official order: cut, then missing, then correct if an accepted answer stands in the prediction as a
    contiguous sequence of normalised words, otherwise incorrect.
    """
    accepted = _accepted(answers)
    prediction = " ".join(prediction.split()[:MAX_JUDGED_WORDS])
    if is_missing(prediction):
        return "missing"
    return "correct" if any(_holds(prediction, answer) for answer in accepted) else "incorrect"


def crag_score(judgements: Iterable[Judgement]) -> float:
    """The CRAG score, -1..1: (2 n_correct + n_missing) / n - 1 (facebookresearch/CRAG, local_evaluation.py)."""
    counts = Counter(judgements)
    n = counts.total()
    if n == 0:
        raise UserError("There are no answers to score: the evaluation split is empty, so give it examples.")
    return (2 * counts["correct"] + counts["missing"]) / n - 1
