"""Which benchmarks there are: lm-eval's tasks, with the packaged items or the hub's.

Prompts, targets, filters and metrics are lm-eval's own task code, so a score means what it means elsewhere. Only where
the items come from is ours, and HumanEval, whose task file would fetch a program from a hub to run programs with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from selfaug.assets import asset_path
from selfaug.errors import UserError

# Tokens of a batch of answers, prompt and answer, for each token of one forward pass: they are computed one at a time.
GENERATION = 8


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    folder: of lm-eval's task files, under lm_eval/tasks. tasks: lm-eval's names, several where it has one for each
    subject. asset, files: the packaged items, by the name of their split. metrics: lm-eval's name (with its filter) ->
    ours; the first is the one that counts for the mean. chance: what guessing scores on it, or on IFEval about what
    one fixed reply does (56 of 541 prompts). chat: whether instruct models are asked through their chat template unless
    the configuration says otherwise. max_new_tokens: of an answer, as lm-eval has it.
    """

    name: str
    folder: str
    tasks: tuple[str, ...]
    asset: str
    files: Mapping[str, str]
    metrics: Mapping[str, str]
    chance: float = 0.0
    chat: bool = False
    generates: bool = False
    runs_code: bool = False
    max_new_tokens: int = 1280

    @property
    def main(self) -> str:
        return next(iter(self.metrics.values()))


_ACC = {"acc": "acc"}
_ACC_NORM = {"acc_norm": "acc_norm", "acc": "acc"}
_IFEVAL = {
    "prompt_level_strict_acc": "prompt_strict",
    "inst_level_strict_acc": "instruction_strict",
    "prompt_level_loose_acc": "prompt_loose",
    "inst_level_loose_acc": "instruction_loose",
}
_GSM8K = {"exact_match,strict-match": "exact_match_strict", "exact_match,flexible-extract": "exact_match_flexible"}
_TEST, _VALIDATION = {"test": "test.jsonl"}, {"validation": "validation.jsonl"}

# fmt: off
MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)

_ALL = (
    Benchmark("ifeval", "ifeval", ("ifeval",), "ifeval", {"train": "test.jsonl"}, _IFEVAL, 0.1, chat=True,
              generates=True),
    Benchmark("arc_easy", "arc", ("arc_easy",), "arc-easy", _TEST, _ACC_NORM, 0.25),
    Benchmark("arc_challenge", "arc", ("arc_challenge",), "arc-challenge", _TEST, _ACC_NORM, 0.25),
    Benchmark("hellaswag", "hellaswag", ("hellaswag",), "hellaswag", _VALIDATION, _ACC_NORM, 0.25),
    Benchmark("piqa", "piqa", ("piqa",), "piqa", _VALIDATION, _ACC_NORM, 0.5),
    Benchmark("winogrande", "winogrande", ("winogrande",), "winogrande", _VALIDATION, _ACC, 0.5),
    Benchmark("lambada", "lambada", ("lambada_openai",), "lambada", _TEST, _ACC),
    Benchmark("mmlu", "mmlu/default", tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS), "mmlu",
              {"test": "test.jsonl", "dev": "dev.jsonl"}, _ACC, 0.25),
    Benchmark("gsm8k", "gsm8k", ("gsm8k_cot",), "gsm8k", _TEST, _GSM8K, generates=True, max_new_tokens=256),
    Benchmark("humaneval", "", ("humaneval",), "humaneval", _TEST, {"pass_at_1": "pass_at_1"}, generates=True,
              runs_code=True, max_new_tokens=1024),
)
# fmt: on
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


@dataclass(frozen=True)
class BenchmarkConfig:
    """How one benchmark is asked; null for what is usual.

    items: how many of its items, a seeded sample; null for all. shots: solved examples in the prompt, 0 where null (a
    task that brings its own examples keeps them). chat: through the chat template. max_new_tokens: of an answer.
    """

    items: int | None = None
    shots: int | None = None
    chat: bool | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class RetentionConfig:
    """Which benchmarks are measured, and how.

    benchmarks: name -> BenchmarkConfig, its settings as a mapping, or null for none.
    data: packaged or hub, where the items come from. run_code: allows benchmarks that run the model's programs.
    backend: hf, or vllm where that is installed (base and tuned then both run on it).
    max_new_tokens, tokens_per_batch: of what has no setting of its own. seed: of the samples and the intervals.
    chat_template, template_arguments: as in data.prompt.
    """

    benchmarks: Mapping[str, Any] = field(default_factory=dict)
    data: str = "packaged"
    run_code: bool = False
    backend: str = "hf"
    max_new_tokens: int = 1280
    tokens_per_batch: int = 8192
    seed: int = 0
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "evaluation.retention"
        for name, choices in (("data", ("packaged", "hub")), ("backend", ("hf", "vllm"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{where}.{name}={getattr(self, name)} is unknown: set it to {' or '.join(choices)}.")
        checked = {
            name: _checked(f"{where}.benchmarks.{name}", name, settings)
            for name, settings in (self.benchmarks or {}).items()
            if settings is not None
        }
        for name in checked:
            if BENCHMARKS[name].runs_code and not self.run_code:
                raise UserError(
                    f"{where}.benchmarks.{name} runs programs that the model writes: set {where}.run_code=true if that "
                    f"is allowed here, or {where}.benchmarks.{name}=null."
                )
            if checked[name].shots and self.data == "packaged" and "dev" not in BENCHMARKS[name].files:
                raise UserError(
                    f"{where}.benchmarks.{name}.shots={checked[name].shots}: no solved examples are "
                    f"packaged for it, so set it to null, or {where}.data=hub."
                )
        for name, least in (("max_new_tokens", 1), ("tokens_per_batch", 1), ("seed", 0)):
            whole_number(f"{where}.{name}", getattr(self, name), least)
        object.__setattr__(self, "benchmarks", checked)


def _checked(setting: str, name: str, settings: Any) -> BenchmarkConfig:
    if name not in BENCHMARKS:
        raise UserError(f"{setting} is no benchmark: choose from {', '.join(BENCHMARKS)}.")
    if not isinstance(settings, BenchmarkConfig):
        known = BenchmarkConfig.__dataclass_fields__
        if unknown := set(settings) - set(known):
            raise UserError(f"{setting}.{min(unknown)} is unknown: a benchmark has {', '.join(known)}.")
        settings = BenchmarkConfig(**settings)
    for key, least in (("items", 1), ("shots", 0), ("max_new_tokens", 1)):
        if getattr(settings, key) is not None:
            whole_number(f"{setting}.{key}", getattr(settings, key), least)
    if settings.chat not in (None, True, False):
        raise UserError(f"{setting}.chat={settings.chat} is not allowed: set it to true, false or null.")
    return settings


def whole_number(setting: str, value: Any, least: int) -> None:
    """Raise UserError unless it is one, and not less."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{setting}={value} is not allowed: set it to a whole number, at least {least}.")


# ---- items -------------------------------------------------------------------------------------------------------


class PackagedItems:
    """The packaged items of a benchmark, by task and split, as lm-eval's tasks expect their data sets."""

    def __init__(self, benchmark: Benchmark):
        self.benchmark = benchmark
        folder = asset_path(benchmark.asset)
        self._splits: dict[str, list[dict[str, Any]]] = {}
        for split, name in benchmark.files.items():
            # Not splitlines(): some texts hold other line separators.
            lines = (folder / name).read_text(encoding="utf-8").split("\n")
            self._splits[split] = [json.loads(line) for line in lines if line]
        self.tested = next(iter(benchmark.files))

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        if len(self.benchmark.tasks) == 1:
            return self._splits[split]
        subject = task.removeprefix("mmlu_")
        return [row for row in self._splits[split] if row["subject"] == subject]

    def sizes(self) -> dict[str, int]:
        """How many items each task tests."""
        return {task: len(self.rows(task, self.tested)) for task in self.benchmark.tasks}

    def dataset(self, task: str, indices: Sequence[int], **_: Any) -> Any:
        """A datasets.DatasetDict in memory, with only these of the items that are tested."""
        from datasets import Dataset, DatasetDict

        rows = {split: self.rows(task, split) for split in self._splits}
        rows[self.tested] = [rows[self.tested][i] for i in indices]
        return DatasetDict({split: Dataset.from_list(those) for split, those in rows.items()})


def task_settings(benchmark: Benchmark, chosen: Mapping[str, Sequence[int]] | None, items: PackagedItems | None) -> Any:
    """What lm-eval's TaskManager is asked to load. chosen: of each task the items; None, with items None: the hub's."""
    members: list[dict[str, Any]] = []
    for task in benchmark.tasks if chosen is None else chosen:
        own: dict[str, Any] = {"task": task}
        if chosen is not None and items is not None:
            # Splits that are not packaged would be asked for otherwise.
            own |= dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
            own |= {"test_split": items.tested, "custom_dataset": partial(items.dataset, task, chosen[task])}
            if "dev" in benchmark.files:
                own["fewshot_split"] = "dev"
        members.append(own)
    if benchmark.runs_code:
        return [{**_HUMANEVAL, **members[0]}]
    # lm-eval merges settings of ours with a task file's only for the members of a group.
    return [{"group": f"selfaug_{benchmark.name}", "task": members}]


def run_tests(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """HumanEval: whether the completed function passes its tests, in a sandbox."""
    from selfaug.evaluation.sandbox import run_program

    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(run_program(program).passed)}


# The settings of lm-eval's humaneval (prompt, stop texts, length), with our way of running the programs.
_HUMANEVAL: dict[str, Any] = {
    "task": "humaneval",
    "dataset_path": "openai/openai_humaneval",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "process_results": run_tests,
    "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
