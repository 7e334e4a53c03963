"""`kit adapt`: plan -> data -> covariances -> attach -> train -> export -> verify -> report.

The result is a plain PEFT LoRA folder for the untouched base model, whatever the method; with `merge` a whole
checkpoint, in which that folder stands as `adapter/`. Nothing here knows a recipe by name.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.adapter_recipe import AdapterPlan, AdapterRecipe, plan_adapters
from kit.convert.checkpoint import Checkpoint, check_matches_config
from kit.convert.data import DataConfig, read_parts
from kit.convert.errors import ExitCode, KitError
from kit.convert.measure import hardware, peak_memory, reset_peak_memory, versions
from kit.convert.pipeline import (
    PROBE_TOKENS,
    Options,
    check_output,
    committed_rows,
    disk_item,
    model_items,
    resolve_device,
    size_text,
    work_item,
)
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts, PlanItem, Recipe, TrainConfig
from kit.convert.work import WorkFolder, disk_errors, put_in_place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kit.convert.covariance_store import Covariances
    from kit.convert.data import TokenRows

ADAPTER = "adapter"  # the PEFT folder inside a merged checkpoint


@dataclass
class AdaptOptions(Options):
    """How to adapt, apart from what the recipe says.

    `dtype` is the base's while an adapter is trained on it ("auto": float32 on a CPU, bfloat16 on a GPU); a merged
    checkpoint is written in the model's own.

    Attributes:
        covariance: file of covariances: read if it is there, otherwise measured and written.
        merge: write a whole checkpoint, with the adapter's folder inside.
    """

    covariance: Path | None = None
    merge: bool = False


def plan(checkpoint: Checkpoint, recipes: list[Recipe], options: AdaptOptions) -> list[PlanItem]:
    """Check what can be checked without weights and describe the work: what is trained, memory, disk, time.

    Of data only the first row is read.

    Raises:
        KitError: on a recipe that makes no adapter, a model without linears to adapt, data that cannot be read, an
            existing output, or too little disk.
    """
    recipe = _the_recipe(recipes)
    config, facts = recipe.config, ModelFacts.of(checkpoint)
    Recipe.plan(recipe, facts)  # a causal language model: what is trained on here is text
    check_output(checkpoint, options)
    if options.merge and "auto_map" in checkpoint.config:
        raise KitError(
            "a model that needs code of its own cannot be written merged",
            where="--merge",
            next_step="leave --merge out: the adapter loads on the model itself",
            exit_code=ExitCode.USAGE,
        )
    _check_dataset(config.train_data, "--train")
    planned = plan_adapters(facts, recipe)
    training, length = config.training, config.train_data.seq_len
    duration = (
        f"{training.steps:,} updates of {training.batch_size} rows of {length:,} tokens"
        if training.epochs is None
        else f"{training.epochs:g} epochs of rows of {length:,} tokens, {training.batch_size} an update"
    )
    items = [
        *model_items(checkpoint),
        PlanItem("recipe", recipe.name),
        *recipe.plan(facts),
        *_covariance_items(recipe, options, list(planned.linears)),
        PlanItem("learns", f"{config.train_data.dataset}, loss on {config.train_data.loss_on}"),
        PlanItem("training", f"{duration}, learning rate {training.learning_rate:g}"),
    ]
    return items + _cost_items(facts, recipe, planned, options)


def _cost_items(
    facts: ModelFacts, recipe: AdapterRecipe, planned: AdapterPlan, options: AdaptOptions
) -> list[PlanItem]:
    """Memory, disk and time.

    Raises:
        KitError: if the disk is too small.
    """
    config, training, length = recipe.config, recipe.config.training, recipe.config.train_data.seq_len
    trained = sum(  # with ranks that follow from spectra: as many as with `rank`, or about
        linear.trained(linear.rank or min(config.rank, linear.out_features, linear.in_features), planned.train_a)
        for linear in planned.linears.values()
    )
    parameters = sum(prod(shape) for shape in facts.shapes.values())
    moments = sum(2 * linear.in_features**2 for linear in planned.linears.values())
    if recipe.covariance_source() == "none" or _is_there(options.covariance):
        moments = 0
    # the adapter and the factors that it started from, the same as the state of the training, and Adam's moments
    needed = (8 + 12) * trained + moments + (4 * parameters if options.merge else 0)
    rows = min(training.micro_batch_size or training.batch_size, training.batch_size)
    kept = 2 if training.gradient_checkpointing else 34  # bytes a hidden number of a layer, as 16-bit training keeps
    activations = rows * length * int(facts.config["hidden_size"]) * facts.num_layers * kept
    activations += rows * length * int(facts.config["vocab_size"]) * 12
    items = [
        PlanItem(
            "memory",
            f"{size_text(parameters * 4)} weights in fp32 (half in 16 bits), {size_text(16 * trained)} for what is "
            f"trained, {size_text(activations)} activations (rough)",
        ),
        disk_item(options.output, needed),
    ]
    if training.epochs is None:
        tokens = training.steps * training.batch_size * length
        flops = (6.0 if training.gradient_checkpointing else 4.0) * tokens * facts.active_parameters
        if moments:
            flops += config.data.num_samples * config.data.seq_len * (2.0 * facts.active_parameters + moments)
        items.append(work_item(flops))
    return items


def _the_recipe(recipes: list[Recipe]) -> AdapterRecipe:
    """The one recipe, which makes an adapter.

    Raises:
        KitError: exit code 2, if it makes none, or there are several.
    """
    if len(recipes) != 1 or not isinstance(recipes[0], AdapterRecipe):
        names = " and ".join(recipe.name for recipe in recipes)
        raise KitError(
            f"recipe {names} makes no adapter" if len(recipes) == 1 else f"one adapter at a time, not {names}",
            where="--recipe",
            next_step="`kit recipes ls` lists all; recipes that change the model itself are for `kit convert`",
            exit_code=ExitCode.USAGE,
        )
    return recipes[0]


def _check_dataset(data: DataConfig, option: str) -> None:
    """Refuse data of which not even the first row can be read.

    Raises:
        KitError: if it cannot.
    """
    if data.dataset in ("", "self"):
        raise KitError(
            "no text to train on" if not data.dataset else "a model learns nothing from text of its own",
            where=option,
            next_step=f"name a data set: {option} FILE, a folder or a hub id",
            exit_code=ExitCode.USAGE,
        )
    next(iter(read_parts(data.dataset, data.split, chat=data.chat or None)))


def _is_there(file: Path | None) -> bool:
    return file is not None and file.exists()


def _check_covariances(file: Path, linears: list[str]) -> None:
    """Refuse a file that holds no covariances of these linears; only its header is read.

    Raises:
        KitError: exit code 2.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            known = json.loads((stored.metadata() or {})["linears"])
        missing = [name for name in linears if name not in known]
        problem = f"the covariances lack '{missing[0]}'" if missing else ""
    except (SafetensorError, OSError, KeyError, ValueError):
        problem = "the file holds no covariances"
    if problem:
        raise KitError(
            problem,
            where=f"--covariance {file}",
            next_step="give a file of this model and these target modules, from `kit covariance` or an earlier "
            "--covariance, or a new name to measure them",
            exit_code=ExitCode.USAGE,
        )


def _covariance_items(recipe: AdapterRecipe, options: AdaptOptions, linears: list[str]) -> list[PlanItem]:
    """Where the covariances come from.

    Raises:
        KitError: if a file is named that nothing will read, or the data cannot be read.
    """
    source, data = recipe.covariance_source(), recipe.config.data
    if source == "none":
        if options.covariance is not None:
            raise KitError(
                f"recipe {recipe.name} uses no covariances",
                where="--covariance",
                next_step="leave it out, or choose a recipe that does",
                exit_code=ExitCode.USAGE,
            )
        return []
    if options.covariance is not None and options.covariance.is_file():
        _check_covariances(options.covariance, linears)
        return [PlanItem("measured", f"before; read from {options.covariance}")]
    if options.covariance is not None and not options.covariance.absolute().parent.is_dir():
        raise KitError(
            "the covariances cannot be read from there, or written",
            where=f"--covariance {options.covariance}",
            next_step="name a file that `kit covariance` wrote, or one to write in a folder that exists",
            exit_code=ExitCode.USAGE,
        )
    dataset = recipe.config.train_data.dataset
    if source == "knowledge":
        dataset = data.dataset
        if dataset != "self":
            _check_dataset(data, "--knowledge")
    text = f"{source}: {'sampled from the model' if dataset == 'self' else dataset}, {data.num_samples:,} rows of "
    kept = f", kept in {options.covariance}" if options.covariance is not None else ""
    return [PlanItem("measured on", f"{text}{data.seq_len:,} tokens{kept}")]


def adapt(checkpoint: Checkpoint, recipes: list[Recipe], options: AdaptOptions, progress: Progress) -> dict[str, Any]:
    """Train an adapter and put it in place.

    Returns:
        The report, as written to kit_report.json.

    Raises:
        KitError: on bad input, a full disk, a loss that is not finite; with exit code 3 if verification fails. What was
            measured and trained is kept for `--resume`, and the old output stays.
    """
    from kit.convert.report import build_report, write_report

    started = time.monotonic()
    items = plan(checkpoint, recipes, options)
    skeleton = check_matches_config(checkpoint)
    reset_peak_memory()
    run = _Adaptation(checkpoint, _the_recipe(recipes), options, progress, skeleton)
    rows = run.training_rows()
    covariances = run.covariances()
    trained = run.train(rows, covariances)
    verification = run.verify()
    report = build_report(
        checkpoint,
        recipes,
        plan=items,
        stages={f"{run.recipe.name}.training": [trained]},
        data=run.data_summaries,
        command=options.command,
        environment={**versions(), "device": hardware(run.device)},
        adapter={
            "base": run.base_name,
            "folder": run.adapter_folder,
            "merged": options.merge,
            "warnings": run.warnings,
        },
        verification={**verification, "probe_tokens": PROBE_TOKENS},
        cost={"seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": peak_memory()},
    )
    write_report(run.work.output, report, recipes)
    put_in_place(run.work.output, options.output)
    run.work.remove()
    return report


@contextmanager
def _few_warnings(progress: Progress) -> Iterator[None]:
    """Let three warnings through, and say how many more there are: a model has hundreds of linears."""
    seen = 0

    def first(record: logging.LogRecord) -> bool:
        nonlocal seen
        seen += record.levelno == logging.WARNING
        return record.levelno != logging.WARNING or seen <= 3

    logger = logging.getLogger("kit")
    logger.addFilter(first)
    try:
        yield
    finally:
        logger.removeFilter(first)
    if seen > 3:
        progress.log(f"... and {seen - 3} more such warnings: all are in kit_report.json, under adapter")


class _Adaptation:
    """State of one run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: AdapterRecipe,
        options: AdaptOptions,
        progress: Progress,
        skeleton: Any,
    ) -> None:
        import torch

        self.checkpoint, self.recipe, self.options, self.progress = checkpoint, recipe, options, progress
        self.skeleton = skeleton
        self.config, self.device = recipe.config, resolve_device(options.device)
        on_gpu = self.device != "cpu"
        default = ("bfloat16" if on_gpu else "float32") if options.dtype == "auto" else options.dtype
        self.dtype: torch.dtype = getattr(torch, default)
        self.data_summaries: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        parts = {
            "model": checkpoint.fingerprint(),
            "recipe": recipe.config.model_dump(mode="json"),
            "covariance file": str(options.covariance),
            "device": self.device.partition(":")[0],
            "dtype": str(self.dtype),
            "versions": versions(),
        }
        self.work = WorkFolder(options.output, parts, resume=options.resume, overwrite=options.overwrite)

    @property
    def base_name(self) -> str:
        """What PEFT loads the base model by: a hub id, or its folder."""
        from kit.convert.report import hub_id

        return hub_id(self.checkpoint.source) or str(self.checkpoint.folder.absolute())

    @property
    def adapter_folder(self) -> str:
        """Where the PEFT folder is, inside the output."""
        return ADAPTER if self.options.merge else "."

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.checkpoint.load_tokenizer()

    def training_rows(self) -> TokenRows:
        """What is learned, as rows of tokens."""
        from kit.convert.data import load_rows

        data, seed, training = self.config.train_data, self.config.seed, self.config.training
        if training.epochs is None:  # no more than the updates take
            most = max(min(data.num_samples, training.steps * training.batch_size), 1)
            data = data.model_copy(update={"num_samples": most})
        rows = committed_rows(self.work, "training-data", lambda: load_rows(data, self.tokenizer, seed=seed))
        self.data_summaries.append({"purpose": "training", "seed": seed, **rows.summary()})
        return rows

    @cached_property
    def probe(self) -> Tensor:
        """Random tokens (1, T) on which logits are compared."""
        import torch

        size = int(self.checkpoint.config["vocab_size"])
        return torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))

    def covariances(self) -> Covariances | None:
        """What the method needs to know of activations: read, taken from an earlier run, or measured now."""
        from kit.convert.covariance_store import Covariances, collect_covariances

        source = self.recipe.covariance_source()
        if source == "none":
            return None
        names = list(plan_adapters(ModelFacts.of(self.checkpoint), self.recipe).linears)
        kept = self.work.path / "covariances.safetensors"
        if not kept.exists() and _is_there(self.options.covariance):
            assert self.options.covariance is not None
            kept = self.options.covariance
        if not kept.exists():
            rows = self.covariance_rows(source)
            measured = collect_covariances(
                self.checkpoint, rows, targets=names, device=self.device, progress=self.progress
            )
            measured.save(kept)
            if self.options.covariance is not None:
                with disk_errors(self.options.covariance):
                    measured.save(self.options.covariance)
        covariances = Covariances.load(kept)
        covariances.check(names)
        self.data_summaries += [
            {"purpose": f"{source} covariances", "seed": self.config.seed, "num_tokens": part["tokens"], **part}
            for part in covariances.sources
        ]
        return covariances

    def covariance_rows(self, source: str) -> TokenRows:
        """The text that covariances are measured on: the knowledge to keep, or the training data, without padding."""
        from kit.convert.data import load_rows

        data, seed = self.config.data, self.config.seed
        if source == "training":
            learned = self.config.train_data
            data = DataConfig(
                dataset=learned.dataset,
                split=learned.split,
                chat=learned.chat,
                num_samples=data.num_samples,
                seq_len=data.seq_len,
                packing=data.packing,
            )

        def load() -> TokenRows:
            model = self.checkpoint.load_model(self.dtype, self.device) if data.dataset == "self" else None
            return load_rows(data, self.tokenizer, seed=seed, model=model, progress=self.progress)

        return committed_rows(self.work, "covariance-data", load)

    def train(self, rows: TokenRows, covariances: Covariances | None) -> dict[str, Any]:
        """Attach the adapters, train them, and write them into the work folder.

        Returns:
            Losses and figures for the report.

        Raises:
            KitError: if the adapters change the model before they are trained, or the loss is not finite.
        """
        import torch

        from kit.convert.adapters import attach, load_initial
        from kit.convert.train import fit

        options, initial = self.options_of(rows), self.work.path / "initial.safetensors"
        model = self.checkpoint.load_model(self.dtype, self.device)
        before = self.logits(model)
        torch.manual_seed(self.config.seed)
        with self.progress.task(f"{self.recipe.name}: attach", 1), _few_warnings(self.progress):
            known = load_initial(initial) if initial.exists() else None
            model = attach(model, self.recipe, covariances, initial=known)
            if known is None:
                model.kit_adapter.save(part := initial.with_suffix(".part"))
                os.replace(part, initial)
                self.work.commit("attach", {}, {"warnings": model.kit_adapter.warnings})
        self.warnings = (self.work.metrics("attach") or {}).get("warnings", [])
        start = self.compare(
            self.logits(model), before, f"recipe {self.recipe.name} changes the model before it is trained"
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        if self.config.training.gradient_checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with self.progress.task(f"{self.recipe.name}: train, steps", options.steps):
            losses = fit(
                trained,
                self.loss_of(model, rows),
                len(rows.input_ids),
                options,
                seed=self.config.seed,
                device=self.device,
                name="training",
                progress=self.progress,
                row_weights=(rows.labels[:, 1:] != -100).sum(1),
                checkpoint=self.work.path / "training.state",
            )
        self.write(model.eval())
        return {
            "losses": losses,
            "trained_parameters": count,
            "steps": options.steps,
            "epochs": round(options.steps * min(options.batch_size, len(rows.input_ids)) / len(rows.input_ids), 3),
            "difference_before_training": start,
        }

    def options_of(self, rows: TokenRows) -> TrainConfig:
        """The training loop's options, with epochs turned into steps."""
        options = self.config.training
        if options.epochs is None:
            return options
        updates = options.epochs * len(rows.input_ids) / min(options.batch_size, len(rows.input_ids))
        return options.model_copy(update={"steps": max(1, round(updates))})

    def loss_of(self, model: Any, rows: TokenRows) -> Callable[[Tensor], Tensor]:
        """The mean next-token loss over the labels of some rows."""
        import torch

        from kit.convert.train import bf16_is_fast

        labels, half = rows.labels, bf16_is_fast(self.device)

        def loss(batch: Tensor) -> Tensor:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
                return model(
                    input_ids=rows.input_ids[batch].to(self.device),
                    position_ids=rows.position_ids[batch].to(self.device),
                    labels=labels[batch].to(self.device),
                    use_cache=False,
                ).loss

        return loss

    def write(self, model: Any) -> None:
        """Write the trained adapter, and what it is verified with, and (`merge`) the whole checkpoint around it."""
        import torch

        from kit.convert.adapters import export, merge
        from kit.convert.export import write_checkpoint
        from kit.convert.streaming import TensorView

        folder = self.work.path / ADAPTER
        self.expected = self.logits(model)
        with self.progress.task("write", 1), disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            export(model, folder)
            described = folder / "adapter_config.json"
            described.write_text(
                json.dumps(json.loads(described.read_text()) | {"base_model_name_or_path": self.base_name}, indent=2),
                encoding="utf-8",
            )
            if not self.options.merge:
                os.replace(folder, self.work.output)
                return
            names = [f"{name}.weight" for name in model.kit_adapter.modules.values()]
            merged = merge(model, lambda name: self.checkpoint.read(f"{name}.weight"))
            stored: torch.dtype = getattr(torch, self.checkpoint.dtype)
            for parameter in merged.parameters():
                parameter.data = parameter.data.to(stored).to(parameter.dtype)
            self.expected_merged = self.logits(merged)
            tensors = dict(merged.named_parameters())
            changed = self.work.commit("merged", {name: tensors[name].to(stored) for name in names}, {})
            view = TensorView(self.checkpoint)
            view.lay_over(changed)
            write_checkpoint(
                self.work.output,
                config=self.checkpoint.config,
                view=view,
                skeleton=self.skeleton,
                source=self.checkpoint,
                dtype=stored,
                max_shard_size=self.options.max_shard_size,
                bundle_entries=[],
            )
            os.replace(folder, self.work.output / ADAPTER)

    def verify(self) -> dict[str, float]:
        """Load what was written as others will, the adapter on a fresh base, and compare logits with training's end.

        Raises:
            KitError: exit code 3, if the adapter does not load, or the logits differ.
        """
        from peft import PeftModel

        from kit.convert.export import verify_checkpoint

        gc.collect()  # the trained model: its hooks and modules refer to each other
        with self.progress.task("verify", 1):
            base = self.checkpoint.load_model(self.dtype, self.device)
            try:
                model = PeftModel.from_pretrained(base, str(self.work.output / self.adapter_folder)).eval()
            except Exception as error:
                raise KitError(
                    f"the written adapter does not load: {type(error).__name__}: {str(error).splitlines()[0]}",
                    where=str(self.work.output),
                    next_step="the work folder is kept for inspection; please report this",
                    exit_code=ExitCode.VERIFICATION,
                ) from error
            problem = "the written adapter computes other logits than the one that was trained"
            found = {"relative_logit_difference": self.compare(self.logits(model), self.expected, problem)}
            del base, model
            if self.options.merge:
                found["relative_logit_difference_merged"] = verify_checkpoint(
                    self.work.output, self.probe, self.expected_merged, dtype=self.dtype, device=self.device
                )
        return found

    def logits(self, model: Any) -> Tensor:
        """Logits of the probe batch (1, T, vocabulary), fp32 on the CPU."""
        import torch

        with torch.no_grad():
            return model(input_ids=self.probe.to(self.device), use_cache=False).logits.float().cpu()

    def compare(self, found: Tensor, expected: Tensor, problem: str) -> float:
        """The largest difference of logits relative to the largest logit.

        Raises:
            KitError: exit code 3, with the problem, if it is more than rounding explains.
        """
        import torch

        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= (1e-3 if self.dtype == torch.float32 else 5e-2):
            raise KitError(
                f"{problem} (relative difference of logits {difference:.2g})",
                where=str(self.work.path),
                next_step="the work folder is kept for inspection, nothing was put in place; please report this",
                exit_code=ExitCode.VERIFICATION,
            )
        return difference
