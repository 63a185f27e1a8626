"""What was learned: answers to questions with documents, of the base model and of the tuned model, scored alike."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from selfaug.evaluation.answers import CRAG_POINTS, Judgement, exact_match, judge, token_f1
from selfaug.evaluation.generation import generate
from selfaug.evaluation.items import by_item
from selfaug.evaluation.statistics import bootstrap, paired_difference
from selfaug.reporting.results import Metric

# A row of the token cache: at least the columns id, input_ids, prompt_length, question and answers.
Row = Mapping[str, Any]


def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    tokens_per_batch: int = 16384,
    progress: bool = True,
    description: str = "answering",
) -> list[str]:
    """The model's greedy answer to each row, in their order; see `generate`. The rows' own responses are not shown."""
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        description=description,
        also_stop={row["input_ids"][-1] for row in rows},  # the end of turn that was trained, whatever the eos is
    )


def score_answers(
    rows_answers: Sequence[Sequence[str]], base: Sequence[str], tuned: Sequence[str] | None, seed: int = 0
) -> dict[str, Metric]:
    """Both models' scores on the same questions, with intervals by resampling the questions.

    Args:
        rows_answers: the accepted answers of each question.
        base, tuned: the answer of each model to each question; None where there is no tuned model.

    Returns:
        exact_match, f1, crag_score, correct, missing, incorrect, each {"base", "tuned", "difference"} -> Interval,
        and the tuned model's `by_item`. Shares and scores are 0..1, crag_score is -1..1. The difference is tuned -
        base, question by question.

    Raises:
        UserError: no questions.
    """
    before = _scores(rows_answers, base)
    if tuned is None:
        return {name: {"base": bootstrap(values, seed=seed)} for name, values in before.items()}
    after = _scores(rows_answers, tuned)
    return {
        name: {
            "base": bootstrap(before[name], seed=seed),
            "tuned": bootstrap(after[name], seed=seed),
            "difference": paired_difference(before[name], after[name], seed=seed),
            **by_item(map(list, rows_answers), after[name]),
        }
        for name in before
    }


def _scores(rows_answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> its value for each question [n]; the mean over questions is the metric."""
    pairs = list(zip(predictions, rows_answers, strict=True))
    judgements: list[Judgement] = [judge(prediction, answers) for prediction, answers in pairs]
    scores = {
        "exact_match": [exact_match(prediction, answers) for prediction, answers in pairs],
        "f1": [token_f1(prediction, answers) for prediction, answers in pairs],
        "crag_score": [CRAG_POINTS[judgement] for judgement in judgements],
    }
    for name in CRAG_POINTS:
        scores[name] = [float(judgement == name) for judgement in judgements]
    return {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}


def samples(
    rows: Sequence[Row], base: Sequence[str], tuned: Sequence[str], n: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """`n` questions with both answers, for a reader: a seeded choice, in the order of the rows.

    Where there are any, at least two thirds of them are questions that the two models answer differently (they show
    what training did), and the others ones where they agree. It is therefore no fair sample of how often they agree.
    """
    if not len(rows) == len(base) == len(tuned):
        raise ValueError(f"{len(rows)} rows, {len(base)} base and {len(tuned)} tuned answers must be as many")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    differ = [i for i in order if base[i] != tuned[i]]
    agree = [i for i in order if base[i] == tuned[i]]
    wanted = max(n - len(agree), -(-2 * n // 3))
    chosen = differ[:wanted]
    chosen += agree[: n - len(chosen)]
    return [
        {
            "id": rows[i]["id"],
            "question": rows[i]["question"],
            "answers": list(rows[i]["answers"]),
            "base": base[i],
            "tuned": tuned[i],
        }
        for i in sorted(chosen)
    ]
