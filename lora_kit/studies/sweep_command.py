"""The command `lora-kit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_kit.errors import BadInputError, RunFailedError


def sweep(
    target: Annotated[
        str, typer.Argument(help="A notebook (03), a recipe, a study, or FILE.py:FUNCTION.")
    ],
    grid: Annotated[Path, typer.Option(help="YAML: NAME: [values], or a list of settings.")],
    seeds: Annotated[str, typer.Option(help="How many, or which: 0,1,5; one alone: 5,")] = "3",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="Fix one parameter.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("-f", help="A notebook's set (smoke, cpu, t4) or a YAML file.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster's: host:6379, auto. None starts one here.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side on each GPU, or CPU.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds: start nothing that would not end in time.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Draw this one.")] = None,
    output: Annotated[Path | None, typer.Option("-o", help="Folder of the records.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="What runs work with; OUTPUT/cells by default.")
    ] = None,
) -> None:
    """Run a grid of parameters with several seeds: a record a run, a table, a figure. Resumable."""
    from lora_kit.studies import sweep as study
    from lora_kit.studies.sweep_grid import names_of, read_grid
    from lora_kit.studies.sweep_targets import find_target, fixed_parameters

    pairs = [word.split("=", 1) for word in parameter or []]
    if lacking := [pair[0] for pair in pairs if len(pair) < 2]:
        raise BadInputError(f"-p {lacking[0]} lacks its value: write -p NAME VALUE.")
    varied = read_grid(grid)
    fixed = fixed_parameters(find_target(target), dict(pairs), file, names_of(varied))
    done = study.sweep(
        target,
        varied,
        _seeds(seeds),
        output,
        fixed,
        work,
        engine,
        address,
        jobs,
        budget,
        metric,
    )
    print(done.summary.to_string(index=False, float_format="{:.4g}".format))
    print(f"records and {study.SUMMARY} in {done.output}; figure {done.figure or 'none'}")
    if done.left:
        print(f"{len(done.left)} run(s) left for the next call: {', '.join(done.left)}")
    if done.failures:
        first = done.failures[0]
        raise RunFailedError(
            f"{len(done.failures)} run(s) failed, the first is {first.name}: {first.error}. "
            f"See {done.output / 'failed'}; the same command tries them again."
        )


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(word) for word in text.removesuffix(",").split(",")]
    except ValueError:
        raise BadInputError(
            f"--seeds takes a number, or numbers: 0,1,5 (one alone: 5,); not {text!r}."
        ) from None
    return numbers if "," in text else numbers[0]
