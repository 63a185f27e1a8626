"""Recipes, turns and random numbers of self-dialogues: with a scripted model, and with a tiny one."""

import json

import pytest

from selfaug.data.chat import ChatFormat
from selfaug.errors import UserError
from selfaug.evaluation.sampling import Sampled, sample
from selfaug.self_dialogues.converse import Conversation
from selfaug.self_dialogues.settings import Filters, Settings
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

START = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


class Script:
    """Says its lines one after another and remembers what it was asked. None: it never comes to an end."""

    def __init__(self, *lines):
        self.lines, self.tokenizer = list(lines), tiny_tokenizer()
        self.prompts, self.uniforms, self.how = [], [], []

    def __call__(self, prompts, uniforms, temperature, top_p):
        self.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        self.uniforms.append(uniforms)
        self.how.append((temperature, top_p))
        said = [self.lines.pop(0) for _ in prompts]
        return [
            Sampled(self.tokenizer("and" if line is None else line)["input_ids"], line is not None) for line in said
        ]


def conversation(script, seeds=(), **settings):
    return Conversation(Settings(**settings), ChatFormat(tiny_tokenizer()), script, seeds)


def texts(draft):
    return [(message["role"][0], message["content"]) for message in draft.messages]


def test_seedless():
    script = Script(" Who? ", "The cat.")
    (draft,) = conversation(script, temperature=0.5, top_p=0.8).write([0])
    assert texts(draft) == [("u", "Who?"), ("a", "The cat.")]
    assert script.prompts == [START, f"{START}Who?{ANSWER}"]
    assert script.how == [(0.5, 0.8), (0.7, 0.9)]
    assert script.uniforms[0].shape == (1, 128)
    assert script.uniforms[1].shape == (1, 384)
    sizes = [len(tiny_tokenizer()(text)["input_ids"]) for text in (" Who? ", "The cat.")]
    assert (draft.tokens, draft.sampled) == (sum(sizes), sum(sizes) + 2)  # and two ends
    assert draft.ended
    assert draft.problem is None


def test_several_turns():
    script = Script("1", "2", "3", "4")
    (draft,) = conversation(script, turns=2).write([0])
    assert texts(draft) == [("u", "1"), ("a", "2"), ("u", "3"), ("a", "4")]
    turn = f"{START}1{ANSWER}2<|im_end|>\n"
    assert script.prompts[2:] == [f"{turn}{START}", f"{turn}{START}3{ANSWER}"]


def test_bait():
    script = Script("Who?", "The cat.")
    (draft,) = conversation(script, recipe="bait", bait="Ask me.").write([0])
    assert texts(draft) == [("u", "Who?"), ("a", "The cat.")]
    assert script.prompts == [f"{START}Ask me.{ANSWER}", f"{START}Who?{ANSWER}"]


def test_prompts_in_a_seeded_order_again_and_again():
    seeds = [f"p{i}" for i in range(5)]
    script = Script(*["a"] * 12)
    drafts = conversation(script, seeds, recipe="prompts").write(range(12))
    asked = [draft.messages[0]["content"] for draft in drafts]
    assert sorted(asked[:5]) == seeds
    assert asked == (asked[:5] * 3)[:12]
    assert len(script.uniforms) == 1  # only answers are sampled
    other = conversation(Script(*["a"] * 5), seeds, recipe="prompts", seed=1).write(range(5))
    assert [draft.messages[0]["content"] for draft in other] != asked[:5]


def test_what_does_not_end():
    script = Script(None, "", "Who?", "Who?", None, "And?", None, "x")
    drafts = conversation(script, turns=2).write(range(4))
    assert [draft.problem for draft in drafts] == ["endless question", "empty question", None, None]
    assert (texts(drafts[2]), drafts[2].ended) == ([("u", "Who?"), ("a", "and")], False)
    # The second question of the last one is missing, so that it ends before.
    assert (texts(drafts[3]), drafts[3].ended) == ([("u", "Who?"), ("a", "And?")], True)


def test_an_answer_without_a_word():
    script = Script("Who?", "Who?", "", "The cat.", "And?", "")
    drafts = conversation(script, turns=2).write(range(2))
    assert [draft.problem for draft in drafts] == ["empty answer", None]
    assert (texts(drafts[1]), drafts[1].ended) == ([("u", "Who?"), ("a", "The cat.")], True)
    sizes = [len(tiny_tokenizer()(text)["input_ids"]) for text in ("Who?", "The cat.", "And?")]
    assert drafts[1].tokens == sum(sizes[:2])
    assert drafts[1].sampled == sum(sizes) + 4  # and the four ends


def test_a_character_that_is_cut_between_its_bytes_is_left_out():
    tokenizer = tiny_tokenizer()
    whole = tokenizer("The cat 日")["input_ids"]
    half = whole[:-1]
    assert tokenizer.decode(half).endswith("\ufffd")

    def said(ids, ended):
        first = iter([Sampled(tokenizer("Who?")["input_ids"], True), Sampled(ids, ended)])
        (draft,) = conversation(lambda *_: [next(first)]).write([0])
        return draft.messages[1]["content"]

    assert said(half, False).strip() == "The cat"
    assert said(half, True) == tokenizer.decode(half)  # the model has said so
    assert said(whole, False) == "The cat 日"


def test_random_numbers_are_of_a_dialogue_and_not_of_its_batch():
    def numbers(batch, seed=0):
        script = Script(*["a"] * (4 * len(batch)))
        conversation(script, turns=2, seed=seed).write(batch)
        return [{n: row.tolist() for n, row in zip(batch, rows, strict=True)} for rows in script.uniforms]

    together, alone = numbers([5, 6, 7]), numbers([6])
    assert [place[6] for place in together] == [place[6] for place in alone]
    streams = [tuple(place[n][:8]) for place in together for n in place]
    assert len(set(streams)) == 12
    assert numbers([6], seed=1)[0][6] != alone[0][6]


@pytest.mark.parametrize("recipe", ["seedless", "bait", "prompts"])
def test_a_dialogue_of_a_tiny_model_does_not_depend_on_its_batch(recipe):
    model, tokenizer = tiny_model("llama", vocab_size=TOKENIZER_VOCAB), tiny_tokenizer()

    def sampler(prompts, uniforms, temperature, top_p):
        return sample(
            model, tokenizer, prompts, uniforms, temperature=temperature, top_p=top_p, also_stop=range(40, 60)
        )

    settings = {"recipe": recipe, "turns": 2, "max_user_tokens": 40, "max_answer_tokens": 40, "temperature": 1.5}
    writer = conversation(sampler, ["Who?", "When is it?"], **settings)
    together = writer.write(range(6))
    assert together == [writer.write([i])[0] for i in range(6)]
    assert sum(draft.problem is None for draft in together) >= 2
    assert len({json.dumps(draft.messages) for draft in together}) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "seedles"}, "self_dialogues.recipe=seedles is unknown: set it to one of seedless, bait, prompts."),
        ({"turns": 0}, "self_dialogues.turns=0 is not allowed"),
        ({"temperature": -1}, "self_dialogues.temperature=-1 is not allowed"),
        ({"top_p": 0}, "self_dialogues.top_p=0 is not allowed"),
        ({"seed": -1}, "self_dialogues.seed=-1 is not allowed"),
        ({"filters": {"lang": "en"}}, "self_dialogues.filters.lang is unknown: there are min_words"),
        ({"filters": {"duplicates": "some"}}, "self_dialogues.filters.duplicates=some is unknown"),
        ({"filters": {"similarity": 2}}, "self_dialogues.filters.similarity=2 is not allowed"),
        ({"prompts": "x.txt"}, "self_dialogues.prompts is only used by self_dialogues.recipe=prompts"),
        ({"prompts": "x.txt", "recipe": "prompts"}, "self_dialogues.prompts=x.txt does not exist"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(**settings)


def test_seed_prompts_from_files(tmp_path):
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("Who?\n\n When? \n")
    records.write_text('{"instruction": "Who?", "output": "x"}\n{"prompt": "When?", "response": ""}\n')
    for file in (lines, records):
        assert Settings(recipe="prompts", prompts=str(file)).seeds() == ["Who?", "When?"]
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(UserError, match="has no prompt"):
        Settings(recipe="prompts", prompts=str(tmp_path / "e.txt")).seeds()


def test_fingerprint_changes_with_what_is_written(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("Who?")
    base = Settings().fingerprint("m")
    assert Settings(filters=Filters(), template_arguments=None).fingerprint("m") == base
    others = [
        Settings().fingerprint("n"), Settings(seed=1).fingerprint("m"), Settings(turns=2).fingerprint("m"),
        Settings(filters={"refusals": True}).fingerprint("m"), Settings(batch_size=1).fingerprint("m"),
        Settings(recipe="prompts", prompts=str(file)).fingerprint("m"),
    ]  # fmt: skip
    file.write_text("When?")
    others.append(Settings(recipe="prompts", prompts=str(file)).fingerprint("m"))
    assert len({base, *others}) == 8
