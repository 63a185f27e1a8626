"""Answer scores on cases whose right value is known by hand."""

import itertools

import pytest

from selfaug.errors import UserError
from selfaug.evaluation.answers import CRAG_POINTS, crag_score, exact_match, is_missing, judge, token_f1

AUSTEN = ("Jane Austen", "Austen")
UNKNOWN = ("I don't know",)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Jane Austen", AUSTEN, 1, 1),
        ("the jane  AUSTEN.", AUSTEN, 1, 1),
        ("austen", AUSTEN, 1, 1),
        # One of two words shared with "Jane Austen": P 1/2, R 1/2; with "Austen" P 1/2, R 1.
        ("Cassandra Austen", AUSTEN, 0, 2 / 3),
        ("Emma", AUSTEN, 0, 0),
        # Words are counted, not only looked up: P 1/2, R 1.
        ("new new", ("new",), 0, 2 / 3),
        ("", AUSTEN, 0, 0),
        ("the", AUSTEN, 0, 0),
        ("Fermat\u2019s theorem", ("Fermat's theorem",), 1, 1),
        # An abstention is right where the documents do not hold the answer, however it is worded ...
        ("I don\u2019t know.", UNKNOWN, 1, 1),
        ("Sorry, I do not know", UNKNOWN, 1, 1),
        # ... and nowhere else; and an empty answer is no abstention.
        ("I don't know", AUSTEN, 0, 0),
        ("", UNKNOWN, 0, 0),
        # What normalisation leaves nothing of is to be given as it is.
        ("A", ("A",), 1, 1),
        ("a", ("A",), 1, 1),
        ("", ("A",), 0, 0),
        ("the", ("?",), 0, 0),
        ("B", ("A", "b"), 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert token_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    "prediction",
    [
        "I don't know",
        "I DON\u2019T KNOW.",
        "i dont know",
        "I do  not\nknow that",
        "Well, I don`t know",
        "",
        " \n",
    ],
)
def test_missing(prediction):
    assert is_missing(prediction)
    assert judge(prediction, AUSTEN) == "missing"
    # Missing even where abstaining is the accepted answer: the official scorer looks no further.
    assert judge(prediction, UNKNOWN) == "missing"


@pytest.mark.parametrize("prediction", ["Jane Austen", "People don't know", "no", "unknown"])
def test_not_missing(prediction):
    assert not is_missing(prediction)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was written by Jane Austen.", AUSTEN, "correct"),
        ("austen", ("Jane Austen",), "incorrect"),  # a part of the answer is not the answer
        ("Austenite", ("Austen",), "incorrect"),  # whole words only
        ("Jane and Cassandra Austen", ("Jane Austen",), "incorrect"),  # contiguous only
        ("in 1815", ("1816",), "incorrect"),
        ("Jane Austen, but I don't know for sure", AUSTEN, "missing"),
        ("Emma", UNKNOWN, "incorrect"),
        (" ".join(["word"] * 74) + " Austen", AUSTEN, "correct"),
        (" ".join(["word"] * 75) + " Austen", AUSTEN, "incorrect"),
        (" ".join(["word"] * 75) + " I don't know", AUSTEN, "incorrect"),
        # Answers that normalisation leaves nothing of.
        ("A", ("A",), "correct"),
        ("B", ("A",), "incorrect"),
        # CRAG's false premises.
        ("This is an invalid question.", ("invalid question",), "correct"),
        ("invalid question", AUSTEN, "incorrect"),
        ("Jane Austen", ("invalid question",), "incorrect"),
        ("near Les Invalides in Paris", ("Paris",), "correct"),
        # Yes or no: the first one said.
        ("Yes, there is no limit", ("yes",), "correct"),
        ("Yes, there is no limit", ("no",), "incorrect"),
        ("The answer is no.", ("No",), "correct"),
        ("true", ("yes",), "incorrect"),
    ],
)
def test_judge(prediction, answers, expected):
    assert judge(prediction, answers) == expected


def test_exact_match_implies_correct_for_short_answers():
    for prediction, answer in itertools.product(["Jane Austen", "The Emma", "1816", "A", "yes", "?"], repeat=2):
        if exact_match(prediction, [answer]):
            assert token_f1(prediction, [answer]) == 1
            assert judge(prediction, [answer]) == "correct"


def test_crag_score():
    assert crag_score(["correct"]) == 1
    assert crag_score(["missing"] * 3) == 0
    assert crag_score(["incorrect"] * 2) == -1
    judgements = ["correct"] * 5 + ["missing"] * 2 + ["incorrect"] * 4
    assert crag_score(judgements) == pytest.approx(1 / 11)
    # The formula of the official scorer is the mean of the points of the paper.
    assert crag_score(judgements) == pytest.approx(sum(CRAG_POINTS[judgement] for judgement in judgements) / 11)
    with pytest.raises(UserError, match="no answers"):
        crag_score([])


@pytest.mark.parametrize("score", [exact_match, token_f1, judge])
def test_answers_are_a_sequence_of_strings(score):
    with pytest.raises(ValueError, match="no accepted answer"):
        score("x", [])
    # max() over the letters of a string would go unnoticed.
    with pytest.raises(TypeError, match="sequence"):
        score("x", "xyz")
