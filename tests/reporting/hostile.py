"""Text that tries to be code, in every place where a user or a model can put text."""

from pathlib import Path
from typing import Any

from benchmarks.report import made_up
from selfaug.reporting.places import FailedJob, Found, read_places
from selfaug.reporting.results import Results, write_results

SCRIPT = "</script><script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror='window.hacked = 1'>"
QUOTES = '"\' onmouseover="window.hacked = 1" x=\''
COMMENT = "<!-- ]]> --> \u2028 &lt;b&gt; &amp; \ud800"
LATEX = r"$x_1$ 50% #1 \input{secret} ~ ^ {a} & b"
TEXTS = (SCRIPT, IMAGE, QUOTES, COMMENT, LATEX)
ALL = " ".join(TEXTS)


def hostile_runs(place: Path) -> Found:
    """Plain LoRA and two rows, one seed each, read from files in `place`; all the text of the last one is hostile, and
    so is a failed job."""
    named = made_up("input_logits")
    named.config["method"]["terms"]["kl"]["position"] = SCRIPT
    for number, run in enumerate([made_up(plain=True), named, _hostile()]):
        write_results(place / str(number) / "results.json", run)
    runs = sorted(read_places([place]).results, key=lambda run: run.config_hash == QUOTES)  # the hostile one last
    return Found(runs, [FailedJob(f"job {SCRIPT}", f"bad {IMAGE} {QUOTES} {LATEX}")])


def _hostile() -> Results:
    run = made_up("output_logits", name=ALL)
    term: dict[str, Any] = run.config["method"]["terms"]["kl"]
    term["position"] = LATEX  # a label is cut to 32 characters
    run.config |= {"note": ALL, f"key {IMAGE}": QUOTES}
    run.code = {"version": IMAGE, "commit": SCRIPT, "dirty": True}
    run.environment = {f"device {SCRIPT}": IMAGE}
    run.config_hash = QUOTES
    run.data["fingerprint"] = SCRIPT
    run.samples = [{"id": SCRIPT, "question": ALL, "answers": [SCRIPT, IMAGE], "base": ALL, "tuned": ALL}]
    tokens = [*TEXTS, "answer"]
    roles = ["template", "document", "document", "question", "template", "response"]
    run.token_kl = {"id": SCRIPT, "tokens": tokens, "roles": roles, "kl": [0.1, 0.2, 0.0, 0.3, 0.4, None]}
    run.drift[f"corpus {SCRIPT}"] = run.drift.pop("wikipedia")
    run.retention[f"bench {IMAGE}"] = run.retention.pop("piqa")
    run.curves[f"probe/{SCRIPT}"] = run.curves.pop("probe/words")
    return run
