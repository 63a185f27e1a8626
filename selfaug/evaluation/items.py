"""What single items (questions, documents, prompts) contributed to a metric of the tuned model.

Kept beside every metric, they let reports compare two runs item by item, whatever sweeps the runs belong to.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from selfaug.reporting.results import Metric


def by_item(asked: Iterable[Any], values: Iterable[float]) -> Metric:
    """Parts of a Metric: `items`, the values (to six digits), whose mean is the metric; `asked`, a digest of what
    identifies each item, by which runs on the same items are known. Of a ratio of sums: its `pseudo_values`."""
    digest = hashlib.sha256(json.dumps(list(asked), default=str).encode()).hexdigest()[:12]
    return {"items": [float(f"{value:.6g}") for value in values], "asked": digest}
