"""plan -> calibrate -> transform -> (train) -> write -> verify -> evaluate -> report.

Layer stages stream: one decoder layer is resident, its changed tensors are committed to the work folder, and it is
freed. Train stages hold the whole model. Nothing here knows a recipe by name.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.checkpoint import Checkpoint, check_matches_config
from kit.convert.data import ROW_LENGTH
from kit.convert.errors import ExitCode, KitError
from kit.convert.measure import free_memory, hardware, peak_memory, reset_peak_memory, versions
from kit.convert.progress import Progress
from kit.convert.recipe import Layer, ModelFacts, PlanItem, Recipe, SearchRun, Stage, TrainRun
from kit.convert.work import WorkFolder, put_in_place, restore_old

if TYPE_CHECKING:
    import torch

    from kit.convert.data import TokenRows
    from kit.convert.streaming import Activations, StreamedModel, TensorView

PROBE_TOKENS = 96
BYTES_EACH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Options:
    """How to convert, apart from what the recipes say.

    Attributes:
        output: folder to make.
        dtype: of the written weights; "auto" is the source's.
        device: "auto", "cpu" or a CUDA device.
        resume: go on from a killed run's work folder.
        overwrite: replace an existing output.
        max_shard_size: bytes a file.
        eval_tokens: held-out tokens of the before/after table; 0 leaves it out.
        activations: where hidden states between layers live: "memory", "disk", or "auto": on disk if they would take
            more than half of the free memory.
        command: the command line, for the report and the card.
    """

    output: Path
    dtype: str = "auto"
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    max_shard_size: int = 5 * 10**9
    eval_tokens: int = 4096
    activations: str = "auto"
    command: str = ""


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "200MB".

    Raises:
        KitError: if it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise KitError(
            f"'{text}' is not a size",
            where="--max-shard-size",
            next_step="write a number and a unit, for example 5GB or 200MB",
            exit_code=ExitCode.USAGE,
        )
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def output_dtype(checkpoint: Checkpoint, options: Options) -> str:
    """The dtype that the result is written in."""
    return checkpoint.dtype if options.dtype == "auto" else options.dtype


def plan(checkpoint: Checkpoint, recipes: list[Recipe], options: Options) -> list[PlanItem]:
    """Check what can be checked without weights and describe the conversion: sizes, memory, disk, work.

    Raises:
        KitError: on an unsupported architecture, an existing output, or too little disk.
    """
    facts = ModelFacts.of(checkpoint)
    for recipe in recipes:
        if recipe.command != "convert":
            raise KitError(
                f"`kit convert` does not run recipe {recipe.name}",
                where="--recipe",
                next_step=f"run `kit {recipe.command} MODEL --recipe {recipe.name}`; see `kit {recipe.command} --help`",
                exit_code=ExitCode.USAGE,
            )
    check_output(checkpoint, options)
    checkpoint.check_runs({"--eval-tokens": min(options.eval_tokens, ROW_LENGTH)})
    dtype = output_dtype(checkpoint, options)
    items = model_items(checkpoint)
    added = 0
    for recipe in recipes:
        items += [PlanItem("recipe", recipe.name), *recipe.plan(facts)]
        items.append(PlanItem("stages", ", ".join(f"{s.method} ({s.kind})" for s in recipe.active_stages()) or "none"))
        added += recipe.new_parameters(facts)
    total = checkpoint.num_parameters + added
    sizes = [size for recipe in recipes if (size := recipe.result_bytes(facts)) is not None]
    size = sizes[-1] if sizes else total * BYTES_EACH[dtype]
    needed = int(size + 4 * added + (4 if _has_train_stage(recipes) else 0) * checkpoint.num_parameters)
    hidden = facts.hidden_size
    embedding = int(facts.config["vocab_size"]) * hidden * 4
    activations = activation_bytes(facts, recipes)
    on_disk = activations_on_disk(facts, recipes, options)
    resident = 0 if on_disk else activations
    needed += activations if on_disk else 0
    one_layer = (checkpoint.num_parameters * 4 - embedding) // facts.num_layers
    whole = total * max(recipe.bytes_per_parameter() for recipe in recipes)
    items += [
        PlanItem("result", f"{dtype}, {size_text(size)}, {added / 1e6:,.2f} M parameters added"),
        PlanItem("memory, streamed", f"{size_text(embedding + 2 * one_layer + resident)} (rough)"),
        PlanItem("activations", f"up to {size_text(activations)} {'on disk' if on_disk else 'in memory'}"),
        PlanItem("memory, whole model", f"{size_text(whole)} + activations (verification and train stages)"),
        disk_item(options.output, needed),
        work_item(sum(recipe.flops_per_parameter() for recipe in recipes) * facts.active_parameters),
    ]
    return items


def activation_bytes(facts: ModelFacts, recipes: list[Recipe]) -> int:
    """Bytes that streamed stages hold at most, in fp32: what enters and leaves a layer, what enters it in another
    model, and what enters and leaves its attention's heads.
    """
    tokens = max((r.config.data.num_samples * r.config.data.seq_len for r in recipes if r.needs_data()), default=0)
    heads, _, head_dim = facts.heads
    return tokens * (4 * facts.hidden_size + heads * head_dim) * 4


def activations_on_disk(facts: ModelFacts, recipes: list[Recipe], options: Options) -> bool:
    """Whether hidden states go to the disk.

    Raises:
        KitError: if the option is none.
    """
    choices = ("auto", "memory", "disk")
    if options.activations not in choices:
        raise KitError(
            f"activations cannot live in '{options.activations}'",
            where="--activations",
            next_step=f"choose one of: {', '.join(choices)}",
            exit_code=ExitCode.USAGE,
        )
    if options.activations == "auto":
        return activation_bytes(facts, recipes) > free_memory("cpu") / 2
    return options.activations == "disk"


def check_output(checkpoint: Checkpoint, options: Options) -> None:
    """Refuse an output that must not be replaced, or a dtype that cannot be written.

    Raises:
        KitError: exit code 2.
    """
    restore_old(options.output)
    if options.output.exists() and not options.overwrite:
        raise KitError(
            "the output folder exists already",
            where=str(options.output),
            next_step="choose another -o, or add --overwrite",
            exit_code=ExitCode.USAGE,
        )
    if _is_something_else(options.output):
        raise KitError(
            "the output folder holds something that is no checkpoint, and would be deleted",
            where=str(options.output),
            next_step="choose another -o",
            exit_code=ExitCode.USAGE,
        )
    if options.output.resolve() == checkpoint.folder.resolve():
        raise KitError(
            "the output folder is the model itself",
            where=str(options.output),
            next_step="choose another -o",
            exit_code=ExitCode.USAGE,
        )
    if (dtype := output_dtype(checkpoint, options)) not in BYTES_EACH:
        raise KitError(
            f"cannot write weights as {dtype}",
            where="--dtype",
            next_step=f"choose one of: auto, {', '.join(BYTES_EACH)}",
            exit_code=ExitCode.USAGE,
        )


def _is_something_else(output: Path) -> bool:
    """Whether a file, or a folder that holds anything but a model or an adapter, stands where the output should go."""
    ours = ("config.json", "adapter_config.json")
    holds_other = output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in ours)
    return output.is_file() or holds_other


def model_items(checkpoint: Checkpoint) -> list[PlanItem]:
    """What the model is."""
    facts = ModelFacts.of(checkpoint)
    size = f"{checkpoint.num_parameters / 1e6:,.1f} M parameters"
    return [
        PlanItem("model", f"{checkpoint.source} ({facts.model_type}, {size})"),
        PlanItem("stored as", f"{checkpoint.dtype}, {size_text(checkpoint.nbytes)}"),
    ]


def disk_item(output: Path, needed: int) -> PlanItem:
    """The bytes that a result and its work folder need, and those that are free.

    Raises:
        KitError: if they do not suffice.
    """
    parent = next(p for p in [output.absolute(), *output.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise KitError(
            f"too little disk: {size_text(needed)} needed, {size_text(free)} free",
            where=str(parent),
            next_step="free some space, or choose another -o",
        )
    return PlanItem("disk", f"{size_text(needed)} needed, {size_text(free)} free")


def work_item(flops: float) -> PlanItem:
    """Floating-point operations, and how long a small machine takes for them."""
    return PlanItem(
        "work", f"{flops / 1e12:,.1f} TFLOP, about {flops / 8e10 / 60:,.0f} min on a 2-core CPU (80 GFLOP/s)"
    )


def _has_train_stage(recipes: list[Recipe]) -> bool:
    return any(stage.kind == "train" for recipe in recipes for stage in recipe.active_stages())


def size_text(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def convert(checkpoint: Checkpoint, recipes: list[Recipe], options: Options, progress: Progress) -> dict[str, Any]:
    """Run recipes on a checkpoint, one after another, and put the result in place.

    Returns:
        The report, as written to kit_report.json.

    Raises:
        KitError: on bad input, a full disk, a non-finite loss; with exit code 3 if verification fails. The old output
            and the committed steps are kept.
    """
    from kit.convert.report import build_report, write_report

    started = time.monotonic()
    items = plan(checkpoint, recipes, options)
    check_matches_config(checkpoint)
    reset_peak_memory()
    run = _Conversion(checkpoint, recipes, options, progress)
    for number, recipe in enumerate(recipes):
        run.apply(number, recipe)
    probe_difference = run.write_and_verify()
    transformed = time.monotonic()
    report = build_report(
        checkpoint,
        recipes,
        plan=items,
        stages=run.stats,
        data=run.data_summaries,
        command=options.command,
        environment={**versions(), "device": hardware(run.device)},
        verification={"relative_logit_difference": probe_difference, "probe_tokens": PROBE_TOKENS},
        cost={"seconds": round(transformed - started, 1), "peak_memory_bytes": peak_memory()},
    )
    if options.eval_tokens:
        report["evaluation"] = run.evaluate()
    write_report(run.work.output, report, recipes)
    put_in_place(run.work.output, options.output)
    run.work.remove()
    return report


def committed_rows(work: WorkFolder, step: str, load: Callable[[], TokenRows]) -> TokenRows:
    """Rows of data, committed so that a resumed run sees the same text."""
    from safetensors.torch import load_file

    from kit.convert.data import TokenRows

    if (done := work.metrics(step)) is not None:
        found = load_file(work.tensors(step))
        return TokenRows(found["input_ids"], found["position_ids"], **done, learned=found.get("learned"))
    rows = load()
    tensors = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "learned": rows.learned}
    summary = {"num_documents": rows.num_documents, "source": rows.source, "sha256": rows.sha256}
    work.commit(step, {name: tensor for name, tensor in tensors.items() if tensor is not None}, summary)
    return rows


class _Conversion:
    """State of one run: the tensors so far, the config so far, what has been measured."""

    def __init__(self, checkpoint: Checkpoint, recipes: list[Recipe], options: Options, progress: Progress) -> None:
        import torch

        from kit.convert.streaming import Scratch, TensorView

        self.checkpoint, self.recipes, self.options, self.progress = checkpoint, recipes, options, progress
        self.device = resolve_device(options.device)
        self.compute_dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.out_dtype: torch.dtype = getattr(torch, output_dtype(checkpoint, options))
        self.config, self.view = checkpoint.config, TensorView(checkpoint)
        self.shapes = ModelFacts.of(checkpoint).shapes
        self.stats: dict[str, list[dict[str, Any]]] = {}
        self.data_summaries: list[dict[str, Any]] = []
        self._tokenizer: Any = None
        parts = {
            "model": checkpoint.fingerprint(),
            "recipes": [recipe.config.model_dump(mode="json") for recipe in recipes],
            "dtype": str(self.out_dtype),
            "versions": versions(),
        }
        self.work = WorkFolder(options.output, parts, resume=options.resume, overwrite=options.overwrite)
        on_disk = activations_on_disk(ModelFacts.of(checkpoint), recipes, options)
        self.scratch = Scratch(self.work.path if on_disk else None)

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.load_tokenizer()
        return self._tokenizer

    def apply(self, number: int, recipe: Recipe) -> None:
        """Run one recipe's stages; its result is the next one's source."""
        before, before_view = self.config, self.view.snapshot()
        if not recipe.replaces_modules:
            self.initialise(f"{number}-new-parameters", recipe)
        rows: TokenRows | None = None
        for stage in recipe.active_stages():
            step = f"{number}-{stage.method}"
            if stage.kind in ("layer", "search", "train") and rows is None and recipe.needs_data():
                rows = self.rows(number, recipe)
            if stage.kind == "prepare":
                self.prepare(step, recipe, stage)
            elif stage.kind == "layer":
                self.stream_layers(step, recipe, stage, rows, before, before_view)
            elif stage.kind == "allocate":
                self.allocate(step, recipe, stage)
            elif stage.kind == "search":
                assert rows is not None
                self.search(step, recipe, stage, rows, partial(self.streamed, before, before_view, recipe.float32))
            else:
                assert rows is not None
                original = partial(self.streamed, before, before_view, recipe.float32)
                self.train(step, recipe, stage, rows, original)
        self.config = recipe.build(self.facts(before))

    def facts(self, config: dict[str, Any]) -> ModelFacts:
        """What a recipe may know of the model in this state of its config."""
        return ModelFacts(config, self.shapes)

    def rows(self, number: int, recipe: Recipe) -> TokenRows:
        """Calibration rows of a recipe, committed so that a resumed run sees the same text."""
        import torch

        from kit.convert.data import load_rows

        config = recipe.config

        def load() -> TokenRows:
            model = None
            if config.data.dataset == "self":
                model = self.checkpoint.load_model(self.out_dtype, self.device)
            return load_rows(config.data, self.tokenizer, seed=config.seed, model=model, progress=self.progress)

        rows = committed_rows(self.work, f"{number}-data", load)
        self.data_summaries.append({"recipe": recipe.name, "seed": config.seed, **rows.summary()})
        torch.manual_seed(config.seed)
        return rows

    def streamed(self, config: dict[str, Any], view: TensorView, float32: bool = False) -> StreamedModel:
        import torch

        from kit.convert.streaming import StreamedModel

        dtype = torch.float32 if float32 else self.compute_dtype
        return StreamedModel(config, view, device=self.device, dtype=dtype, scratch=self.scratch)

    def initialise(self, step: str, recipe: Recipe) -> None:
        """Commit the starting values of parameters that the recipe's modules have and the model has not."""
        import torch

        if self.work.metrics(step) is None:
            torch.manual_seed(recipe.config.seed)
            model = self.streamed(recipe.build(self.facts(self.config)), self.view)
            new: dict[str, torch.Tensor] = {}
            for index in range(len(model)):
                prefix = model.layer_prefix(index)
                names = model.layer_names(index)
                if all(prefix + name in self.view for name in names):
                    continue
                with model.layer(index) as module:
                    state = module.state_dict()
                    new |= {prefix + n: state[n].clone() for n in names if prefix + n not in self.view}
            self.work.commit(step, new, {})
        self.view.lay_over(self.work.tensors(step))

    def prepare(self, step: str, recipe: Recipe, stage: Stage) -> None:
        if self.work.metrics(step) is None:
            with self.progress.task(f"{recipe.name}: {stage.method}", 1):
                metrics = getattr(recipe, stage.method)(self.view) or {}
            self.work.commit(step, self.view.pending, metrics)
            self.view.pending.clear()
        self.view.lay_over(self.work.tensors(step))

    def stream_layers(
        self,
        step: str,
        recipe: Recipe,
        stage: Stage,
        rows: TokenRows | None,
        before: dict[str, Any],
        before_view: TensorView,
    ) -> None:
        """Run a layer stage: one layer resident (and its original, where that feeds the next)."""
        if recipe.replaces_modules:
            self.replace_layers(step, recipe, stage, rows, before)
            return
        assert rows is not None
        facts = self.facts(before)
        model = self.streamed(recipe.build(facts), self.view)
        original = self.streamed(before, before_view) if stage.propagate == "original" else None
        feeder = original or model
        used = slice(recipe.stage_rows(stage, len(rows.input_ids)))
        inputs = feeder.embed(rows.input_ids[used], rows.position_ids[used])
        metrics: list[dict[str, Any]] = []
        with self.progress.task(f"{recipe.name}: {stage.method}, layers", len(model)):
            for index in range(len(model)):
                key = f"{step}-layer-{index:04d}"
                done = self.work.metrics(key)
                if done is not None:
                    self.view.lay_over(self.work.tensors(key))
                last = index == len(model) - 1
                if not (done and last):
                    with model.layer(index) as module, original.layer(index) if original else nullcontext() as base:
                        layer = Layer(index, module, base, inputs, model, original, self.device, self.progress, facts)
                        layer.state = self.work.path / f"{key}.training"
                        if done is None:
                            done = getattr(recipe, stage.method)(layer)
                            prefix = model.layer_prefix(index)
                            self.view.lay_over(self.work.commit(key, self.changed(module, prefix), done))
                        layer.state.unlink(missing_ok=True)
                        inputs = inputs if last else layer.advance()
                metrics.append(done)
                self.progress.step(1, **dict(list(done.items())[-1:]))
        self.stats[f"{recipe.name}.{stage.method}"] = metrics

    def replace_layers(
        self, step: str, recipe: Recipe, stage: Stage, rows: TokenRows | None, before: dict[str, Any]
    ) -> None:
        """Run a layer stage that leaves other modules behind: what was committed is loaded, and feeds the next layer.

        A stage that propagates "original" changes nothing: it measures.
        """
        float32, facts = recipe.float32, self.facts(before)
        model, feeder = self.streamed(before, self.view, float32), None
        if stage.propagate != "original":
            feeder = self.streamed(recipe.build_for_calibration(facts), self.view, float32)
        inputs = model.embed(rows.input_ids, rows.position_ids) if rows is not None else None
        originals = inputs if stage.propagate == "both" else None
        metrics: list[dict[str, Any]] = []
        with self.progress.task(f"{recipe.name}: {stage.method}, layers", len(model)):
            for index in range(len(model)):
                key = f"{step}-layer-{index:04d}"
                after: Activations | None = None
                outputs: Activations | None = None
                if (done := self.work.metrics(key)) is None:
                    with model.layer(index) as module:
                        layer = Layer(index, module, None, inputs, model, None, self.device, self.progress, facts)
                        layer.original_inputs = originals
                        layer.state = self.work.path / f"{key}.training"
                        done = getattr(recipe, stage.method)(layer)
                        changed = self.changed(module, model.layer_prefix(index)) if feeder else {}
                        self.work.commit(key, changed, done)
                        layer.state.unlink(missing_ok=True)
                        after, outputs = layer.original_outputs, layer.outputs
                if originals is not None and index < len(model) - 1:
                    originals = after or self.advance(model, index, originals)
                self.view.lay_over(self.work.tensors(key))
                if inputs is not None and index < len(model) - 1:
                    inputs = outputs or self.advance(feeder or model, index, inputs)
                metrics.append(done)
                self.progress.step(1, **dict(list(done.items())[-1:]))
        self.stats[f"{recipe.name}.{stage.method}"] = metrics

    def advance(self, model: StreamedModel, index: int, inputs: Activations) -> Activations:
        """What leaves a layer as the view has it now."""
        with model.layer(index):
            return model.advance(inputs)

    def allocate(self, step: str, recipe: Recipe, stage: Stage) -> None:
        done = self.work.metrics(step)
        if done is None:
            done = getattr(recipe, stage.method)(self.stats, self.facts(self.config))
            self.work.commit(step, {}, done)
        recipe.allocation |= done

    def search(
        self, step: str, recipe: Recipe, stage: Stage, rows: TokenRows, model: Callable[[], StreamedModel]
    ) -> None:
        """Run a search stage: like an allocate stage, with the streamed model at hand."""
        done = self.work.metrics(step)
        if done is None:
            run = SearchRun(rows, self.device, self.progress, model, self.stats, self.facts(self.config))
            done = getattr(recipe, stage.method)(run)
            self.work.commit(step, {}, done)
        recipe.allocation |= done

    def train(
        self, step: str, recipe: Recipe, stage: Stage, rows: TokenRows, original: Callable[[], StreamedModel]
    ) -> None:
        """Run a train stage: the whole converted model resident."""
        done = self.work.metrics(step)
        if done is None:
            model = self.streamed(recipe.build(self.facts(self.config)), self.view, recipe.float32).resident()
            state = self.work.path / f"{step}.training"
            done = getattr(recipe, stage.method)(TrainRun(model, rows, self.device, self.progress, original, state))
            self.work.commit(step, self.changed(model, ""), done)
            state.unlink(missing_ok=True)
            del model
        self.view.lay_over(self.work.tensors(step))
        self.stats[f"{recipe.name}.{stage.method}"] = [done]

    def changed(self, module: Any, prefix: str) -> dict[str, Any]:
        """A module's tensors that differ from the model so far, by full name."""
        import torch

        changed = {}
        tied = set(getattr(module, "all_tied_weights_keys", None) or ())
        for name, tensor in module.state_dict().items():
            full = prefix + name
            if name in tied:
                continue
            if full not in self.view or not torch.equal(self.view.read(full, tensor.dtype), tensor.cpu()):
                changed[full] = tensor
        return changed

    def write_and_verify(self) -> float:
        """Write the result into the work folder, reload it, and compare its logits with the conversion's."""
        import torch

        from kit.convert.export import auto_map, verify_checkpoint, write_checkpoint
        from kit.convert.streaming import StreamedModel, build_skeleton, streamed_logits

        entries = list(dict.fromkeys(r.bundle_entry for r in self.recipes if r.bundle_entry))
        for entry in entries:
            self.config = auto_map(self.config, entry)
        with self.progress.task("write", 1):
            write_checkpoint(
                self.work.output,
                config=self.config,
                view=self.view,
                skeleton=build_skeleton(self.config),
                source=self.checkpoint,
                dtype=self.out_dtype,
                max_shard_size=self.options.max_shard_size,
                bundle_entries=entries,
            )
        with self.progress.task("verify", 1):
            generator = torch.Generator().manual_seed(0)
            probe = torch.randint(int(self.config["vocab_size"]), (1, PROBE_TOKENS), generator=generator)
            dtype = torch.float32 if self.fits_in_float32() else self.out_dtype
            model = StreamedModel(self.config, self.view, device=self.device, dtype=dtype, round_to=self.out_dtype)
            expected = streamed_logits(model, probe)
            return verify_checkpoint(self.work.output, probe, expected, dtype=dtype, device=self.device)

    def fits_in_float32(self) -> bool:
        """Whether the whole model in float32 fits this device's free memory."""
        return 4 * 1.2 * self.checkpoint.num_parameters < free_memory(self.device)

    def evaluate(self) -> dict[str, Any]:
        """The before/after table on held-out text sampled from the source."""
        from kit.convert.checkpoint import open_checkpoint
        from kit.convert.evaluate import evaluate

        result = open_checkpoint(str(self.work.output))
        return evaluate(
            {"converted": result},
            base=self.checkpoint,
            num_tokens=self.options.eval_tokens,
            seed=self.recipes[0].config.seed + 1,
            device=self.device,
            ablations=True,
            progress=self.progress,
        )


def resolve_device(device: str) -> str:
    """Turn "auto" into the GPU if there is one.

    Raises:
        KitError: if a CUDA device is asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise KitError(
            f"no GPU for device '{device}'",
            where="--device",
            next_step="use --device cpu, or install a CUDA build of torch",
            exit_code=ExitCode.USAGE,
        )
    return device
