"""KL(base||tuned) of one example, token by token: where in a prompt the tuned model has moved away from its base.

For people to look at (the report colours the text with it); drift.py measures how much on held-out text.
"""

from typing import Any

import torch
from torch import nn

from selfaug.evaluation.generation import evaluating
from selfaug.model.decoder import Decoder
from selfaug.model.reference import adapters_off
from selfaug.objective.batch import Role
from selfaug.objective.rows import existing_rows
from selfaug.ops import linear_kl

MOST_TOKENS = 600
_BEFORE_GAP = 1 / 4  # of a long example this share is shown from its start, the rest from its end
GAP = "gap"  # role of the one token that stands for what was left out


@torch.no_grad()
def token_kl(model: nn.Module, tokenizer: Any, example: dict[str, Any], most: int = MOST_TOKENS) -> dict[str, Any]:
    """The KL of every row of a tokenised example (`id`, `input_ids` and `roles`; see data/tokenised.py).

    The adapters of `model` are the tuned model, switched off they are the base. The whole example is run; of one with
    more than `most` tokens the start and the end are returned, because its end holds question and response.

    Returns:
        {"id", "tokens": their text, "roles": names of their roles in small letters, "kl": nats to four digits}, three
        lists of one length. kl[t] is of row t, which predicts token t+1; null of the last token, which has no row.
        Where tokens were left out stands one of role "gap", its text their number.
    """
    decoder = Decoder(model)
    device = next(model.parameters()).device
    ids = torch.as_tensor(example["input_ids"], dtype=torch.long).unsqueeze(0)  # [1, T]
    roles = torch.as_tensor(example["roles"], dtype=torch.long).unsqueeze(0)
    rows = existing_rows(roles)[0]  # [T]
    mask = torch.ones_like(ids).to(device)
    with evaluating(model):
        tuned = decoder.hidden(ids.to(device), mask, right_padded=True)[0, rows]  # [N, d]
    with adapters_off(model):
        base = decoder.hidden(ids.to(device), mask, right_padded=True)[0, rows]
    values = iter(linear_kl(tuned, base, **decoder.head.arguments(), reduction="none").tolist())
    kl = [float(f"{max(next(values), 0.0):.4g}") if row else None for row in rows.tolist()]
    names = [Role(role).name.lower() for role in roles[0].tolist()]
    texts = token_texts(tokenizer, ids[0].tolist())
    if len(texts) > most:
        start = int(most * _BEFORE_GAP)
        end = len(texts) - (most - start - 1)
        texts[start:end], names[start:end], kl[start:end] = [str(end - start)], [GAP], [None]
    return {"id": str(example["id"]), "tokens": texts, "roles": names, "kl": kl}


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text. A character that several tokens make up belongs to the last of them."""
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts: list[str] = []
    before = pending = 0  # tokens [before, pending) are written already; decoded along, for some drop a leading space
    for place in range(len(ids)):
        written = tokenizer.decode(ids[before:pending], **settings)
        text = tokenizer.decode(ids[before : place + 1], **settings)
        whole = not text.endswith("\ufffd") or place == len(ids) - 1
        texts.append(text[len(written) :] if whole else "")
        if whole:
            before, pending = pending, place + 1
    return texts
