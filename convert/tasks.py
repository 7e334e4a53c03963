"""Tasks of lm-evaluation-harness on a loaded model: its YAMLs, prompts, metrics and loop; our data, log and resume.

Nothing of the harness is written again here. `load_tasks` builds its task objects, over local rows if asked;
`Tasks.run` gives them and `_LoggedModel`, its own Hugging Face model around ours, to its `evaluate`. `_LoggedModel`
writes each sample when its last request is answered, and does not ask again what the log knows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import datasets
import numpy
import torch
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from kit.convert.errors import ExitCode, KitError, closest
from kit.convert.eval_folder import EvalFolder, SampleLog
from kit.convert.progress import Progress
from kit.convert.task_data import TaskData, TaskOptions

ALIASES = {"lambada": "lambada_openai"}  # the variant that papers report; the harness's tag also runs lambada_standard
NORMALIZED = ("arc_challenge", "hellaswag", "openbookqa")  # papers print acc_norm of these, acc of the others


def load_tasks(options: TaskOptions) -> Tasks:
    """Build the harness's tasks with their data; reads no weights.

    Raises:
        KitError: exit code 2, if a task is unknown (with the closest match), its data missing or broken (with file,
            line and field), or it has fewer examples than the prompt wants.
    """
    manager = _manager()
    known = manager.task_index
    names: list[str] = []
    for name in options.names:
        name = ALIASES.get(name, name)
        if name not in known:
            raise KitError(
                f"'{name}' is no task of lm-evaluation-harness",
                where="--tasks",
                next_step=f"{closest(name, known)}`lm-eval ls tasks` lists them",
                exit_code=ExitCode.USAGE,
            )
        names += sorted(known[name].tags) if name in manager.all_tags else [name]
    data = TaskData(options.data_dir) if options.data_dir else None
    overrides = {"class": _local_task(data, options.num_fewshot)} if data else {}
    built: dict[str, Task | Group] = {}
    for name in dict.fromkeys(names):
        if data and known[name].kind.name == "PY_TASK":
            raise KitError(
                f"task {name} reads its data with code of its own, which local files cannot replace",
                where="--tasks",
                next_step="leave it out, or run it without --data-dir",
                exit_code=ExitCode.USAGE,
            )
        try:
            # what TaskManager.load calls; it alone takes a class for the tasks of a group
            built[name] = TaskFactory().build(known[name], overrides=dict(overrides), registry=known)
        except KitError:
            raise
        except Exception as error:
            raise _not_loaded(name, error, data is not None) from error
    tasks = Tasks(options, built, data)
    for name, task in tasks.leaves.items():
        shots = _shots(task.config.num_fewshot, options.num_fewshot)
        task.set_config("num_fewshot", shots)
        pool = getattr(getattr(task, "sampler", None), "df", None)
        if pool is not None and shots > len(pool):
            raise KitError(
                f"{shots} examples in the prompt are more than the {len(pool)} that task {name} has",
                where="--num-fewshot",
                next_step=f"use {len(pool)} or fewer",
                exit_code=ExitCode.USAGE,
            )
    return tasks


@functools.cache
def _manager() -> TaskManager:
    """The harness's index of tasks; it reads some thousand YAMLs."""
    return TaskManager()


def _shots(own: int | None, asked: int | None) -> int:
    """Examples in the prompt, by the harness's rule: a task whose YAML says 0 stays at 0."""
    return own or 0 if asked is None or own == 0 else asked


def _local_task(data: TaskData, num_fewshot: int | None) -> type[ConfigurableTask]:
    """The harness's task with its rows from `data`: the split it scores and, if examples are wanted, theirs."""

    class LocalTask(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            config = self.config
            splits = {config.test_split or config.validation_split}
            if self._examples():
                own = (self.fewshot_cfg.split, config.training_split, config.validation_split, config.test_split)
                splits.add(next(split for split in own if split))
            self.dataset = {
                split: datasets.Dataset.from_list(
                    data.rows(config.task, config.dataset_path, config.dataset_name, split)
                )
                for split in sorted(splits)
            }

        def fewshot_docs(self) -> Any:
            return super().fewshot_docs() if self._examples() else None

        def _examples(self) -> int:
            return 0 if self.fewshot_cfg.samples is not None else _shots(self.config.num_fewshot, num_fewshot)

    return LocalTask


def _not_loaded(name: str, error: Exception, local: bool) -> KitError:
    if isinstance(error, ImportError):
        advice = "install what it names (`pip install lm-eval[tasks]` has most)"
    elif local:
        advice = "see that the file's rows have the fields that this data set has on the hub (docs/evaluation.md)"
    else:
        advice = "offline, put the task's files into a folder and name it with --data-dir (docs/evaluation.md)"
    lines = str(error).strip().splitlines() or ["no message"]
    return KitError(
        f"task {name} cannot be loaded: {type(error).__name__}: {lines[0]}", where="--tasks", next_step=advice
    )


@dataclass
class Tasks:
    """Tasks of the harness, ready to run.

    Args:
        options: what was asked for.
        built: the harness's task or group by name, in the order asked for.
        data: local rows, if they came from there.
    """

    options: TaskOptions
    built: dict[str, Task | Group]
    data: TaskData | None

    @property
    def leaves(self) -> dict[str, Task]:
        """The tasks themselves, those of groups too, by name."""
        found: dict[str, Task] = {}
        for item in self.built.values():
            found |= {task.task_name: task for task in _members(item)}
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the scores beside the model."""
        return {
            "names": list(self.built),
            "limit": self.options.limit,
            "num_fewshot": self.options.num_fewshot,
            "batch_size": self.options.batch_size,
            "lm_eval": version("lm_eval"),
            "data": dict(sorted(self.data.hashes.items())) if self.data else None,
            "notes": list(self.data.notes) if self.data else [],
        }

    def open_logs(self, folder: EvalFolder | None, name: str, model: dict[str, Any]) -> dict[str, SampleLog]:
        """The log of samples of each task.

        Args:
            folder: where they stand; None: in memory.
            name: the model's name.
            model: what decides its answers: fingerprint, dtype, device.

        Raises:
            KitError: exit code 2, if the folder holds samples of another model or made with other settings.
        """
        if folder is None:
            return {task: SampleLog(None) for task in self.leaves}
        packages = {package: version(package) for package in ("lm_eval", "torch", "transformers")}
        decided = {**model, "batch_size": self.options.batch_size, "versions": packages}
        logs = {}
        for task_name, task in self.leaves.items():
            config = {key: value for key, value in task.dump_config().items() if key != "metadata"}
            parts = {**decided, "num_fewshot": config.pop("num_fewshot"), "task": _digest(config)}
            parts["data"] = self.data.used.get(task_name) if self.data else None
            logs[task_name] = folder.samples(name, task_name, parts)
        return logs

    def run(
        self, model: Any, tokenizer: Any, logs: dict[str, SampleLog], progress: Progress, label: str
    ) -> dict[str, Any]:
        """Score a model.

        Args:
            model: a transformers causal language model, on its device.
            tokenizer: its tokenizer.
            logs: from `open_logs`; finished samples are taken from there, new ones added.
            progress: shows the samples.
            label: what to call the model there.

        Returns:
            By task: `metrics` (names and values as the harness has them; a filter other than "none" follows the name),
            `main` (the metric that papers print), `num_samples`, `num_fewshot`, `correct` (1 or 0 a sample, by the
            main metric, if it is right or wrong) and, for a group, `subtasks`.
        """
        leaves = self.leaves
        for task in leaves.values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        limit = self.options.limit
        sizes = [len(task.eval_docs) for task in leaves.values()]
        total = sum(min(limit or size, size) for size in sizes)
        groups = {
            group.name: group
            for item in self.built.values()
            if isinstance(item, Group)
            for group in (item, *item.get_all_groups())
        }
        devices = [model.device.index] if model.device.type == "cuda" else []
        # the harness prints, and stdout is ours; its seeds, which it sets for all, stay in here
        with progress.task(f"tasks on {label}", total), contextlib.redirect_stdout(sys.stderr), _seeds(devices):
            wrapped = _LoggedModel(model, tokenizer, self.options.batch_size, leaves, logs, progress)
            result = evaluate(wrapped, {"tasks": leaves, "groups": groups}, limit=limit, log_samples=True)
        for log in logs.values():
            log.sort()
        return {name: self._entry(name, item, result) for name, item in self.built.items()}

    def _entry(self, name: str, item: Task | Group, result: dict[str, Any]) -> dict[str, Any]:
        found = result["results"][name]
        metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in found.items()
            if "," in key and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        main = _main_metric(name, metrics)
        tasks = _members(item)
        entry = {
            "metrics": metrics,
            "main": main,
            "num_samples": sum(result["n-samples"][task.task_name]["effective"] for task in tasks),
            "num_fewshot": tasks[0].config.num_fewshot,
        }
        values = [value for task in tasks for value in _values(result["samples"][task.task_name], main)]
        if values and all(value in (0, 1) for value in values):
            entry["correct"] = [int(value) for value in values]
        if isinstance(item, Group):
            entry["subtasks"] = {task.task_name: self._entry(task.task_name, task, result) for task in tasks}
        return entry


def _members(item: Task | Group) -> list[Task]:
    return item.get_all_tasks() if isinstance(item, Group) else [item]


@contextlib.contextmanager
def _seeds(devices: list[int]) -> Any:
    """The seeds that the harness sets for tasks that sample; the generators are put back afterwards."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices):
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def _main_metric(name: str, metrics: dict[str, float]) -> str | None:
    """The metric that papers print of a task."""
    order = ["acc_norm", "acc"] if name in NORMALIZED else ["acc", "acc_norm"]
    order += [key for key in metrics if key.startswith("exact_match") and "_stderr" not in key]
    return next((key for key in (*order, *metrics) if key in metrics), None)


def _values(samples: list[dict[str, Any]], metric: str | None) -> Iterable[Any]:
    """One metric of the samples, in order of documents."""
    name, _, filter_name = (metric or "").partition(",")
    filter_name = filter_name or "none"
    chosen = [sample for sample in samples if sample["filter"] == filter_name and name in sample]
    return [sample[name] for sample in sorted(chosen, key=lambda sample: sample["doc_id"])]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class _LoggedModel(HFLM):
    """The harness's Hugging Face model around a loaded one, that logs samples and answers from the log.

    The harness calls `loglikelihood`, `loglikelihood_rolling` and `generate_until` with the requests of all tasks,
    which HFLM sorts by length; it tells its cache hook each answer as it comes. We are that hook.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        tasks: dict[str, Task],
        logs: dict[str, SampleLog],
        progress: Progress,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._tasks, self._logs, self._progress = tasks, logs, progress
        self._waiting: dict[str, deque[Callable[[Any], None]]] = {}
        self.cache_hook = self

    def add_partial(self, method: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Hear an answer from HFLM (the interface of the harness's cache hook)."""
        waiting = self._waiting.get(_digest([method, *arguments]))
        if waiting:
            waiting.popleft()(answer)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer from the log, and ask the model for the rest."""
        ask = super().loglikelihood
        return self._logged("loglikelihood", lambda todo: ask(todo, disable_tqdm=True), requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The same, a document at a time: HFLM tells its hook only when all of a call's documents are done."""
        ask = super().loglikelihood_rolling
        return self._logged(
            "loglikelihood_rolling", lambda todo: [ask([request], disable_tqdm=True)[0] for request in todo], requests
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer from the log, and ask the model for the rest."""
        ask = super().generate_until
        return self._logged("generate_until", lambda todo: ask(todo, disable_tqdm=True), requests)

    def _loglikelihood_tokens(self, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """HFLM's, without the bar that it shows for each window of a rolling document."""
        return super()._loglikelihood_tokens(*args, **{**options, "disable_tqdm": True})

    def _logged(self, method: str, ask: Callable[[list[Instance]], list[Any]], requests: list[Instance]) -> list[Any]:
        documents: dict[tuple[str, int], list[int]] = {}
        for position, request in enumerate(requests):
            documents.setdefault((request.task_name, request.doc_id), []).append(position)
        answers: dict[int, Any] = {}
        todo: list[int] = []
        self._waiting = {}
        for (task, doc_id), positions in documents.items():
            asked = [requests[position] for position in positions]
            key = _digest([method, *(request.args for request in asked)])
            sample = self._logs[task].find(doc_id, key)
            if sample is not None:
                stored = sample["responses"]
                answers |= zip(positions, map(tuple, stored) if method == "loglikelihood" else stored, strict=True)
                self._progress.step()
                continue
            finish = self._finish(self._tasks[task], doc_id, key, asked)
            for number, position in enumerate(positions):
                todo.append(position)
                queue = self._waiting.setdefault(_digest([method, *requests[position].args]), deque())
                queue.append(functools.partial(finish, number))
        if todo:
            answers |= zip(todo, ask([requests[position] for position in todo]), strict=True)
        return [answers[position] for position in range(len(requests))]

    def _finish(self, task: Task, doc_id: int, key: str, asked: list[Instance]) -> Callable[[int, Any], None]:
        """What to call with the answer to each of a document's requests; the last call writes the sample."""
        answers: dict[int, Any] = {}

        def finish(number: int, answer: Any) -> None:
            answers[number] = answer
            if len(answers) == len(asked):
                ordered = [answers[number] for number in range(len(asked))]
                self._logs[task.task_name].add({"doc_id": doc_id, "requests": key, **_sample(task, asked, ordered)})
                self._progress.step()

        return finish


def _sample(task: Task, asked: list[Instance], answers: list[Any]) -> dict[str, Any]:
    """One line of the log: what the model was asked, what it answered, what the harness makes of it.

    `asked` holds a request as often as it is repeated. Metrics that the harness takes over all samples (perplexity)
    stand here as what it takes them of.
    """
    copies: dict[int, Instance] = {}
    for request, answer in zip(asked, answers, strict=True):
        copies.setdefault(id(request), replace(request, resps=[], filtered_resps={})).resps.append(answer)
    instances = list(copies.values())
    for each in task._filters:
        each.apply(instances)
    doc = instances[0].doc
    line: dict[str, Any] = {"prompt": instances[0].args[0]}
    if asked[0].request_type == "loglikelihood":
        line["continuations"] = [request.args[1] for request in asked]
    line |= {"target": task.doc_to_target(doc), "responses": answers, "filtered": {}, "metrics": {}}
    for name in instances[0].filtered_resps:
        filtered = [instance.filtered_resps[name] for instance in instances]
        if name != "none":
            line["filtered"][name] = filtered
        for metric, value in task.process_results(doc, filtered).items():
            line["metrics"][metric if name == "none" else f"{metric},{name}"] = value
    return json.loads(json.dumps(line, default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
