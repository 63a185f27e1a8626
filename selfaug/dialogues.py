"""Let the base model write dialogues, to mix them into the training of it (SA-SFT, Magpie).

Run as: python -m selfaug.dialogues self_dialogues.number=500                 500 dialogues, or what is missing of them
        python -m selfaug.dialogues self_dialogues=bait self_dialogues.turns=2
        python -m selfaug.dialogues self_dialogues=prompts self_dialogues.prompts=FILE
        ... self_dialogues.filters.duplicates=near    leave some out (selfaug/self_dialogues/settings.py)

`python -m selfaug.train method=sa_sft` writes what it needs by itself, with the same settings into the same place. A
killed run of either goes on with the batch in which it was stopped.
"""

import json
import logging
import random
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfaug import cli

log = logging.getLogger(__name__)

NUMBER = 500  # where nothing else is asked for


def write(config: DictConfig) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """Write what is missing. Returns the folder, the dialogues that were asked for, and their statistics, which are
    also kept in statistics.json there."""
    # Here and not above, so that --help and --cfg answer at once.
    from selfaug.data.sources.self_dialogues import SelfDialogues
    from selfaug.errors import UserError
    from selfaug.files import write_json
    from selfaug.run.make import make
    from selfaug.run.self_dialogues import written
    from selfaug.self_dialogues.statistics import statistics

    cli.quieten()
    source = make(config.self_dialogues, "self_dialogues")
    if not isinstance(source, SelfDialogues):
        raise UserError("self_dialogues is no SelfDialogues: choose one of selfaug/conf/self_dialogues.")
    source.ask(examples=NUMBER)
    folder = Path(config.out).expanduser() if config.out else None
    store = written(config, source.settings, source.wanted, folder)
    records = list(store.records(source.wanted))
    found = statistics(records, store.progress)
    write_json(store.folder / "statistics.json", found)
    return store.folder, records, found


def _task(config: DictConfig) -> None:
    from rich.table import Table

    from selfaug.reporting.table import console

    folder, records, found = write(config)
    page = console()
    table = Table("", "", title="Self-dialogues", show_header=False)
    for name, value in found.items():
        shown = f"{value:,.3g}" if isinstance(value, float) else json.dumps(value)
        table.add_row(name.replace("_", " "), shown)
    page.print(table)
    for record in random.Random(0).sample(records, min(config.samples, len(records))):
        page.rule(f"dialogue {record['id']}")
        for message in record["messages"]:
            page.print(f"{message['role']}: {message['content']}", markup=False, highlight=False)
    page.print(f"Dialogues, settings and statistics: {folder}", soft_wrap=True, highlight=False)


def main() -> None:
    cli.run(_task, "dialogues")


if __name__ == "__main__":
    main()
