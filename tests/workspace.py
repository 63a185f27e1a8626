"""A folder with everything that `python -m selfaug.train` needs, tiny: a model, a data file, texts for drift."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
_NAMES = ["Ada", "Bela", "Cleo", "Dora", "Egon", "Fritz", "Gerda", "Hugo"]
_TOWNS = ["Aachen", "Bonn", "Cham", "Daun", "Emden", "Fulda", "Gera", "Hof"]


class Workspace:
    """Commands run in `path`, as a user would run them, on one thread, without a hub."""

    def __init__(self, path: Path):
        self.path = path
        self.runs = path / "runs"
        save_tiny(path / "model")
        draw = random.Random(0)
        write_lines(path / "data.jsonl", [_question(i, draw) for i in range(60)])
        write_lines(
            path / "texts.jsonl", [{"text": f"{n} went to {t}, and liked it there."} for n in _NAMES for t in _TOWNS]
        )
        write_lines(
            path / "dialogues.jsonl", [{"prompt": f"Who is {n}?", "response": f"{n} is a friend."} for n in _NAMES]
        )

    def overrides(self) -> list[str]:
        corpora = "evaluation.drift.corpora"
        return [
            "model=local", "model.name=model", "data=jsonl", "data.path=data.jsonl", "data.source.test_share=0.3",
            "data.batch_size=4", "data.micro_batch_size=2", "data.prompt.max_tokens=256", "adapter.r=4",
            f"{corpora}.wikipedia={{kind: text, asset: null, path: texts.jsonl, limit: 4, max_tokens: 64}}",
            f"{corpora}.dialogues={{kind: dialogue, asset: null, path: dialogues.jsonl, limit: 4, max_tokens: 64}}",
            "evaluation=task", "evaluation.rag.limit=4", "evaluation.rag.max_new_tokens=4", "progress=false",
        ]  # fmt: skip

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            **os.environ, "SELFAUG_RUNS": str(self.runs), "SELFAUG_CACHE": str(self.path / "cache"),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables,
        }  # fmt: skip

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "selfaug.train", *self.overrides(), *overrides]

    def train(self, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run to the end; stdout and stderr are kept apart."""
        return subprocess.run(
            self.command(*overrides), cwd=self.path, env=self.environment(**variables), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    def directories(self) -> list[Path]:
        """The run directories, oldest first."""
        return sorted(
            (d for d in self.runs.iterdir() if (d / "config.yaml").is_file()), key=lambda d: d.stat().st_ctime
        )


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _question(i: int, draw: random.Random) -> dict:
    name, town = draw.choice(_NAMES), draw.choice(_TOWNS)
    documents = [{"title": f"Note {i}", "text": f"{name} number {i} lives in {town}.", "gold": True}]
    documents += [
        {"text": f"{draw.choice(_NAMES)} has a cat called {draw.choice(_TOWNS)}."} for _ in range(draw.randint(0, 2))
    ]
    return {"id": f"q{i}", "question": f"Where does {name} number {i} live?", "answers": [town], "documents": documents}
