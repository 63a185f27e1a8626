"""KL(base||tuned) of one example, token by token: where in a prompt the tuned model has moved away from its base.

For people to look at (the report colours the text with it); drift.py measures how much on held-out text.
"""

from typing import Any

import torch
from torch import nn

from selfaug.evaluation.pair import Pair
from selfaug.objective.batch import Role
from selfaug.objective.rows import existing_rows

MOST_TOKENS = 600
_BEFORE_GAP = 1 / 4  # of a long example this share is shown from its start, the rest from its end
GAP = "gap"  # role of the one token that stands for what was left out


@torch.no_grad()
def token_kl(
    model: nn.Module,
    tokenizer: Any,
    example: dict[str, Any],
    most: int = MOST_TOKENS,
    base: nn.Module | None = None,
) -> dict[str, Any]:
    """The KL of every row of a tokenised example (`id`, `input_ids` and `roles`; see data/tokenised.py).

    `model` is the tuned model; the base is `base`, or `model` with its adapters switched off. The whole example is run;
    of one with more than `most` tokens the start and the end are returned, because its end holds question and response.

    Returns:
        {"id", "tokens": their text, "roles": names of their roles in small letters, "kl": nats to four digits}, three
        lists of one length. kl[t] is of row t, which predicts token t+1; null of the last token, which has no row.
        Where tokens were left out stands one of role "gap", its text their number.
    """
    pair = Pair(model, base)
    ids = torch.as_tensor(example["input_ids"], dtype=torch.long).unsqueeze(0)  # [1, T]
    roles = torch.as_tensor(example["roles"], dtype=torch.long).unsqueeze(0)
    rows = existing_rows(roles)  # [1, T]
    states = pair.hidden(*(tensor.to(pair.device) for tensor in (ids, torch.ones_like(ids), rows)))
    values = iter(pair.kl(*states).tolist())
    kl = [float(f"{max(next(values), 0.0):.4g}") if row else None for row in rows[0].tolist()]
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
