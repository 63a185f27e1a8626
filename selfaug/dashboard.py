"""A Weights & Biases workspace with the views of the report: what was learned, what was kept, and the curves.

Run as: python -m selfaug.dashboard ENTITY/PROJECT               build it; prints its address
        python -m selfaug.dashboard ENTITY/PROJECT --dry-run     print what would be built, as JSON; needs no network

Needs `logger=wandb` in the runs, and the packages of selfaug[wandb] here. Every call makes a new view.
"""

import argparse
import json
import sys
from typing import Any

from selfaug.errors import UserError

# Panels by section: (kind, title, metrics). Every name is one that selfaug logs; a panel of what a run has not
# measured stays empty. scatter: x, y. bars: one bar for each run. curves: over optimiser steps. table: of each run.
TASK, KEPT, DRIFT = "task/f1", "retention/mean/kept", "drift/wikipedia/kl_base_tuned"
VIEWS: dict[str, list[tuple[str, str, list[str]]]] = {
    "Learned and kept": [
        ("scatter", "task against retention", [KEPT, TASK]),
        ("scatter", "task against drift", [DRIFT, TASK]),
        ("scatter", "drift against retention", [DRIFT, KEPT]),
        ("bars", "task: F1", [TASK]),
        ("bars", "task: exact match", ["task/exact_match"]),
        ("bars", "task: CRAG score", ["task/crag_score"]),
        ("bars", "kept: tuned / base, mean over the benchmarks", [KEPT]),
        ("bars", "drift on Wikipedia, nats per token", [DRIFT]),
        ("bars", "drift on dialogues, nats per token", ["drift/dialogues/kl_base_tuned"]),
    ],
    "Alpha": [
        ("scatter", "task over alpha", ["train/alpha", TASK]),
        ("scatter", "retention over alpha", ["train/alpha", KEPT]),
        ("scatter", "drift over alpha", ["train/alpha", DRIFT]),
    ],
    "Forgetting while training": [
        ("curves", "drift, nats per token", ["probe/drift_wikipedia", "probe/drift_dialogues"]),
        ("curves", "IFEval, prompts followed", ["probe/ifeval_prompt_strict"]),
        ("curves", "length of the answers, words", ["probe/words"]),
        ("curves", "share of one-line answers", ["probe/one_line"]),
    ],
    "Training": [
        ("curves", "loss", ["train/loss"]),
        ("curves", "NLL", ["train/nll", "val/nll"]),
        ("curves", "KL, nats per row", ["train/kl", "val/kl"]),
        ("curves", "alpha", ["train/alpha"]),
        ("curves", "learning rate", ["train/lr"]),
        ("curves", "norm of the gradient", ["train/grad_norm"]),
        ("curves", "tokens per second", ["speed/tokens_per_s"]),
    ],
    "General benchmarks": [
        ("bars", "IFEval", ["retention/ifeval/prompt_strict"]),
        ("bars", "ARC-Easy", ["retention/arc_easy/acc_norm"]),
        ("bars", "ARC-Challenge", ["retention/arc_challenge/acc_norm"]),
        ("bars", "HellaSwag", ["retention/hellaswag/acc_norm"]),
        ("bars", "PIQA", ["retention/piqa/acc_norm"]),
        ("bars", "WinoGrande", ["retention/winogrande/acc"]),
        ("bars", "LAMBADA", ["retention/lambada/acc"]),
        ("bars", "MMLU", ["retention/mmlu/acc"]),
        ("bars", "GSM8K", ["retention/gsm8k/exact_match_strict"]),
        ("table", "base and tuned model", ["benchmarks"]),
    ],
    "Sample answers": [("table", "base and tuned model", ["samples"])],
}


def metrics() -> set[str]:
    """Every metric that the workspace shows, tables aside."""
    panels = [panel for section in VIEWS.values() for panel in section]
    return {name for kind, _, names in panels if kind != "table" for name in names}


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace as an object of wandb_workspaces, not saved. Raises UserError where that package is missing."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise UserError("The dashboard needs a package that is missing: pip install 'selfaug[wandb]'.") from error

    def panel(kind: str, title: str, names: list[str]) -> Any:
        if kind == "scatter":
            x, y = (wr.SummaryMetric(metric) for metric in names)
            return wr.ScatterPlot(title=title, x=x, y=y)
        if kind == "bars":
            return wr.BarPlot(title=title, metrics=list(names), max_runs_to_show=50)
        if kind == "curves":
            return wr.LinePlot(title=title, x="trainer/global_step", y=list(names), max_runs_to_show=50)
        return wr.WeavePanelSummaryTable(table_name=names[0], layout=wr.Layout(w=24, h=10))

    shown = ["run:group", "run:jobType", *(f"summary:{metric}" for metric in (TASK, KEPT, DRIFT))]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=section, panels=[panel(*one) for one in panels], is_open=place < 3)
            for place, (section, panels) in enumerate(VIEWS.items())
        ],
        settings=ws.WorkspaceSettings(max_runs=50),
        runset_settings=ws.RunsetSettings(pinned_columns=shown),
    )


def save(view: Any) -> str:
    """Create the view; its address. Raises UserError where W&B cannot be reached or refuses."""
    import wandb

    from selfaug.run.loggers import has_wandb_key

    if not has_wandb_key():
        raise UserError("There is no W&B key: set WANDB_API_KEY or run `wandb login`, or use --dry-run.")
    try:
        view.save()
        return view.url
    except (wandb.Error, OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise UserError(
            f"W&B did not take the workspace ({why}): check the network, the key and {view.entity}/{view.project}."
        ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m selfaug.dashboard", description="Build a W&B workspace for your runs.")
    parser.add_argument("place", metavar="ENTITY/PROJECT", help="where the runs are")
    parser.add_argument("--name", default="selfaug", help="of the workspace")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built")
    options = parser.parse_args(arguments)
    try:
        entity, slash, project = options.place.partition("/")
        if not (entity and slash and project) or "/" in project:
            raise UserError(
                f"{options.place} is no place for a workspace: write ENTITY/PROJECT, as in W&B's addresses."
            )
        view = workspace(entity, project, options.name)
        if options.dry_run:
            print(json.dumps(view._to_model().model_dump(by_alias=True, exclude_none=True, mode="json"), indent=1))
        else:
            print(f"Workspace: {save(view)}")
    except UserError as error:
        sys.exit(f"selfaug: {error}")


if __name__ == "__main__":
    main()
