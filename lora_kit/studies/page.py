"""One self-contained page about a demo run: pictures embedded, no script, no network."""

from __future__ import annotations

import base64
from pathlib import Path

from lora_kit import store
from lora_kit.notebook import describe
from lora_kit.studies.records import Metric, Record

GIB = 2**30


def write_page(folder: Path, records: list[Record]) -> Path:
    """Render executed notebooks to HTML and write `index.html`, which embeds their figures.

    Args:
        folder: holds `<notebook>.ipynb` and `figures/`.
        records: the notebooks' records, in order.

    Returns:
        The path of `index.html`.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lora_kit.studies", "templates"), autoescape=True, trim_blocks=True
    )
    chapters = [_chapter(folder, record) for record in records]
    total = sum(r.seconds for r in records)
    html = environment.get_template("index.html").render(
        chapters=chapters,
        minutes=total / 60,
        hardware=records[0].hardware if records else {},
        versions=records[0].versions if records else {},
        created=records[-1].created.replace("T", " ")[:16] if records else "",
        gains=gains(records),
        tables={name: rows for r in records for name, rows in r.tables.items()},
        memory_gib=(records[0].hardware["memory"] / GIB) if records else 0,
        picture=lambda name: _picture(folder / "figures" / f"{name}.png"),
    )
    return store.write_text(folder / "index.html", html)


def gains(records: list[Record]) -> list[dict]:
    """Pairs of metrics named `<what>_before` and `<what>_after`, as per cent with intervals."""
    found = []
    for record in records:
        for name, before in record.metrics.items():
            after = record.metrics.get(name.removesuffix("_before") + "_after")
            if name.endswith("_before") and after is not None:
                pair = {"before": _percent(before), "after": _percent(after)}
                what = name.removesuffix("_before").replace("_", " ")
                found.append({"what": what, "study": record.study[:2], **pair})
    return found


def _percent(metric: Metric | float) -> dict:
    if isinstance(metric, float):
        return {"value": 100 * metric, "text": f"{100 * metric:.0f} %"}
    text = f"{100 * metric.value:.0f} %"
    if metric.low is not None and metric.high is not None:
        text += f" (95 %: {100 * metric.low:.0f} to {100 * metric.high:.0f})"
    return {"value": 100 * metric.value, "text": text}


def _chapter(folder: Path, record: Record) -> dict:
    import nbformat

    notebook = nbformat.read(folder / f"{record.study}.ipynb", as_version=4)
    lines = notebook.cells[0].source.splitlines()
    title = lines[0].lstrip("# ")
    question = next((x for x in lines if x.startswith("**Question")), "")
    figures = sorted((folder / "figures").glob(f"{record.study[:2]}_*.png"))
    return {
        "name": record.study,
        "title": title,
        "question": question.split("**")[-1].strip(" :"),
        "minutes": record.seconds / 60,
        "html": _render(folder, record.study),
        "metrics": [
            (
                name.replace("_", " "),
                describe(m if isinstance(m, float) else m.model_dump(exclude_none=True)),
            )
            for name, m in record.metrics.items()
        ],
        "tables": record.tables,
        "figures": [_picture(f) for f in figures],
    }


def _render(folder: Path, name: str) -> str:
    """The executed notebook as a page of its own; returns its file name."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(template_name="lab").from_filename(str(folder / f"{name}.ipynb"))
    store.write_text(folder / f"{name}.html", body)
    return f"{name}.html"


def _picture(path: Path) -> dict | None:
    if not path.exists():
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem.replace("_", " "), "uri": f"data:image/png;base64,{data}"}
