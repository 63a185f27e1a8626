"""Dialogues as tokens: exactly the chat template's, every token with the right role."""

import pytest
from transformers import AutoTokenizer

from selfaug.assets import asset_path
from selfaug.data.chat import ChatFormat
from selfaug.data.dialogue import Dialogue, DialogueBuilder
from selfaug.data.prompt import PromptBuilder, PromptConfig
from selfaug.data.schema import Example
from selfaug.errors import UserError
from selfaug.objective.batch import Role
from tests.tiny import tiny_tokenizer

Q, R, T = int(Role.QUESTION), int(Role.RESPONSE), int(Role.TEMPLATE)
HELLO = [("user", "Hello, who is it?"), ("assistant", "The cat.")]
MORE = [*HELLO, ("user", "And the other one?"), ("assistant", "Another cat, of course.")]


def dialogue(turns, **settings):
    return Dialogue("d", tuple({"role": role, "content": text} for role, text in turns), **settings)


def built(turns, tokenizer=None, max_tokens=None, **settings):
    builder = DialogueBuilder(ChatFormat(tokenizer or tiny_tokenizer()), max_tokens)
    return builder, builder.build([dialogue(turns, **settings)])


def parts(tokenizer, tokens):
    """[(role, text)] of the runs of equal roles."""
    runs = []
    for token, role in zip(tokens.input_ids, tokens.roles, strict=True):
        if runs and runs[-1][0] == role:
            runs[-1][1].append(token)
        else:
            runs.append((role, [token]))
    return [(role, tokenizer.decode(ids)) for role, ids in runs]


@pytest.mark.parametrize("turns", [HELLO, MORE, [("system", "Be kind."), *MORE]], ids=["one", "two", "system"])
def test_tokens_are_those_of_the_template(turns):
    tokenizer = tiny_tokenizer()
    builder, (tokens,) = built(turns)
    messages = list(dialogue(turns).messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert tokenizer.decode(tokens.input_ids) == whole
    assert tokens.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert builder.stats.tokens == len(tokens.input_ids)
    assert builder.stats.response_tokens == tokens.roles.count(R)


def test_roles():
    _, (tokens,) = built([("system", "Be kind."), *MORE])
    assert parts(tiny_tokenizer(), tokens) == [
        (T, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"),
        (Q, "Hello, who is it?"),
        (T, "<|im_end|>\n<|im_start|>assistant\n"),
        (R, "The cat.<|im_end|>"),
        (T, "\n<|im_start|>user\n"),
        (Q, "And the other one?"),
        (T, "<|im_end|>\n<|im_start|>assistant\n"),
        (R, "Another cat, of course.<|im_end|>"),
    ]


def test_an_answer_that_was_cut_off_has_no_end():
    _, (tokens,) = built(MORE, ended=False)
    assert parts(tiny_tokenizer(), tokens)[-1] == (R, "Another cat, of course.")
    assert parts(tiny_tokenizer(), tokens)[3] == (R, "The cat.<|im_end|>")


def test_the_same_tokens_as_the_task_has():
    """A question without documents, prompted as the task's are."""
    prompted = PromptBuilder(tiny_tokenizer(), PromptConfig(instruction="Say.")).build(
        [Example("e", "Who is it?", ("The cat",), ())]
    )[0]
    _, (tokens,) = built([("user", "Say.\n\nQuestion: Who is it?"), ("assistant", "The cat")])
    assert tokens.input_ids == prompted.input_ids
    assert [role == R for role in tokens.roles] == [role == R for role in prompted.roles]


def test_long_dialogues_lose_turns_and_then_themselves():
    _, (whole,) = built(MORE)
    _, (first,) = built(HELLO)
    builder, (cut,) = built(MORE, max_tokens=len(whole.input_ids) - 1)
    assert cut.input_ids == first.input_ids
    assert (builder.stats.cut, builder.stats.dropped_long) == (1, 0)
    builder, left = built(MORE, max_tokens=len(first.input_ids) - 1)
    assert left == []
    assert (builder.stats.cut, builder.stats.dropped_long) == (0, 1)


def test_what_nobody_answers_is_left_out():
    builder, (tokens,) = built([*HELLO, ("user", "And?")])
    assert tokens.input_ids == built(HELLO)[1][0].input_ids
    builder, left = built([("user", "And?")])
    assert left == []
    assert builder.stats.dropped_silent == 1
    # Nor an empty answer: all that would be learned of it is to be silent.
    builder, left = built([("user", "And?"), ("assistant", " ")])
    assert left == []
    assert builder.stats.dropped_silent == 1
    _, (tokens,) = built([*HELLO, ("user", "And?"), ("assistant", "")])
    assert tokens.input_ids == built(HELLO)[1][0].input_ids
    _, (tokens,) = built([("user", "And?"), ("assistant", ""), *HELLO])
    assert [text for role, text in parts(tiny_tokenizer(), tokens) if role == R] == ["The cat.<|im_end|>"]


def test_plain_text_is_learned_from_its_second_token_on():
    tokenizer = tiny_tokenizer()
    builder, (tokens,) = built([("text", "The cat is there.")], max_tokens=5)
    assert tokens.input_ids == tokenizer("The cat is there.")["input_ids"][:5]
    assert tokens.roles == [R] * 5
    assert builder.stats.cut == 1
    assert built([("text", "a")])[1] == []


def test_markup_in_a_text_does_not_end_a_turn():
    _, (tokens,) = built([("user", "What is <|im_end|>?"), ("assistant", "<|im_end|> ends a turn")])
    assert tokens.input_ids.count(2) == 2  # the template's own


def test_a_template_that_leaves_messages_out_is_refused():
    chat = ChatFormat(tiny_tokenizer(), "{{ messages[:2] | map(attribute='content') | join }}<|im_end|>")
    with pytest.raises(UserError, match="does not show every message"):
        DialogueBuilder(chat).build([dialogue(MORE)])


@pytest.mark.assets
@pytest.mark.parametrize("turns", [HELLO, MORE], ids=["one", "two"])
def test_the_packaged_model_s_template(turns):
    """Which has a system text of its own."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("smollm2-135m-instruct"))
    _, (tokens,) = built(turns, tokenizer)
    whole = tokenizer.apply_chat_template(list(dialogue(turns).messages), tokenize=False).removesuffix("\n")
    assert tokens.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert parts(tokenizer, tokens)[0][1].startswith("<|im_start|>system\nYou are a helpful")
    assert [text for role, text in parts(tokenizer, tokens) if role == R] == [
        f"{text}<|im_end|>" for role, text in turns if role == "assistant"
    ]
