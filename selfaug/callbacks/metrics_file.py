"""metrics.csv: what was logged, by optimiser step."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsFile(CSVLogger):
    """metrics.csv in the run directory. A resumed run keeps the rows up to the step of its checkpoint."""

    def __init__(self, directory: Path):
        self._path = directory / "metrics.csv"
        self._aside = directory / "metrics.before-resume.csv"
        # CSVLogger deletes a file that it finds. Put it aside; if an earlier resume got no further than this, what it
        # put aside is the whole story so far.
        if getattr(rank_zero_only, "rank", 0) == 0:  # of several processes only one writes
            if self._path.is_file() and not self._aside.is_file():
                self._path.rename(self._aside)
            self._path.unlink(missing_ok=True)
        super().__init__(str(directory), name="", version="", flush_logs_every_n_steps=10)

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Write the earlier rows of steps up to `step` again; called when training starts."""
        if not self._aside.is_file():
            return
        with self._aside.open(newline="") as file:
            for row in csv.DictReader(file):
                if 0 < step >= int(row["step"]):  # one that starts at 0 writes its first row itself
                    values = {name: _number(value) for name, value in row.items() if value and name != "step"}
                    self.experiment.log_metrics(values, int(row["step"]))
        self.save()
        self._aside.unlink()


def _number(text: str) -> int | float:
    """As it was written: a count must not come back as 12.0."""
    try:
        return int(text)
    except ValueError:
        return float(text)
