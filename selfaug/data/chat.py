"""A model's chat template, taken apart once: what stands before and after the user's text, and how a response ends.

The template is rendered with a mark in place of the text, so that every token of a prompt can be told to come from the
template or from the user, and so that thousands of prompts cost one rendering.
"""

import re
from collections.abc import Mapping
from typing import Any

from selfaug.errors import UserError

_USER, _ANSWER = "selfaugusermark", "selfauganswermark"  # plain letters: no template trims or escapes them

# Llama 3.1's template writes today's date into the prompt; a run must not depend on the day it is started on.
_SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class ChatFormat:
    """One user turn and the model's answer, in the words of a tokenizer's chat template.

    Args:
        tokenizer: of transformers, with offsets (a tokenizer.json).
        template: Jinja text for models that ship none.
        arguments: passed to the template, for example enable_thinking=False.
        system: text of a system message; where the template refuses one, it opens the user's turn.
        setting: the configuration key that the messages of errors name.

    Attributes:
        before, after: text around the user's text, generation prompt included.
        end_ids: tokens that end a response.

    Raises:
        UserError: no template, or one that does not show the user's text exactly once.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        system: str | None = None,
        setting: str = "data.prompt.chat_template",
    ):
        self.tokenizer, self._given, self._arguments = tokenizer, template, dict(arguments or {})
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, which the token roles need: "
                "set model.name to a model with a tokenizer.json."
            )
        if not (template or tokenizer.chat_template):
            raise UserError(f"The model has no chat template: set {setting}, or model.name to an instruct model.")
        text = template or tokenizer.chat_template
        if isinstance(text, str) and "strftime_now" in text:
            self._given = _SAME_DAY + text
        # Not all_special_ids: <|eot_id|> and <end_of_turn> are special tokens that no attribute of theirs names.
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(set(self._special.values()), key=lambda token: (-len(token), token))
        self.markup = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.before, self.after, self.end_ids = self._take_apart(system, setting)

    def prompt(self, text: str) -> str:
        """The whole prompt around the user's text."""
        return f"{self.before}{text}{self.after}"

    def encode(self, texts: list[str], offsets: bool = False) -> Any:
        """input_ids (and offset_mapping) of each text, as they stand: nothing is added or cut."""
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        # verbose=False: transformers warns of texts over the model's limit, which are counted and cut elsewhere.
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=offsets, verbose=False
        )

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are markup and no text."""
        return frozenset(self._special)

    @property
    def template(self) -> str:
        """The Jinja text that is used."""
        return str(self._given or self.tokenizer.chat_template)

    def defuse(self, text: str) -> str:
        """User text must not close its own turn: a space breaks up whatever would become a special token."""
        return self.markup.sub(lambda match: match[0][0] + " " + match[0][1:], text) if self.markup else text

    def _take_apart(self, system: str | None, setting: str) -> tuple[str, str, list[int]]:
        user = _USER
        try:
            prompt = self._render([("user", user)], system, generate=True)
        except Exception as error:  # Jinja's own errors, and whatever a template raises
            if system is None or "system" not in str(error).lower():
                raise UserError(
                    f"The chat template does not take one user message ({error}): set {setting}."
                ) from error
            # Gemma's templates refuse a system message.
            user, system = f"{system}\n\n{_USER}", None
            prompt = self._render([("user", user)], None, generate=True)
        if prompt.count(_USER) != 1:
            raise UserError(f"The chat template does not show the user's text exactly once: set {setting}.")
        before, after = prompt.split(_USER)
        end = self._render([("user", user), ("assistant", _ANSWER)], system, generate=False).rpartition(_ANSWER)[2]
        return before, after, self._end_of_turn(end)

    def _render(self, turns: list[tuple[str, str]], system: str | None, generate: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.render(messages, add_generation_prompt=generate)

    def render(self, messages: list[dict[str, str]], **how: Any) -> str:
        """The text of any dialogue; `how` as apply_chat_template takes it (add_generation_prompt, ...)."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=self._given, **self._arguments, **how
        )

    def _end_of_turn(self, text: str) -> list[int]:
        """Of the text after a response the tokens up to the first special one, which stops generation."""
        ids = self.encode([text])["input_ids"][0]
        for i, token in enumerate(ids):
            if token in self._special:
                return ids[: i + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token: set model.name to an instruct model.")
        return [self.tokenizer.eos_token_id]
