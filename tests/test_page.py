"""The demo's page: everything in one file, nothing from elsewhere, no text taken for markup."""

import base64
import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_kit.studies.page import gains, write_page
from lora_kit.studies.records import new_record

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert('x')</script> & <b>bold</b>"


def made(name, **fields):
    return new_record(
        name, "lora-kit run", **{"parameters": {}, "metrics": {}, "seconds": 90, **fields}
    )


@pytest.fixture
def folder(tmp_path):
    """Two executed notebooks and three figures."""
    for name, title in (("03_train", "03 · Train"), ("05_swap", f"05 · {EVIL}")):
        cells = [
            new_markdown_cell(f"# {title}\n\n**Question:** Does it <learn>?"),
            new_code_cell("1 + 1"),
        ]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    (tmp_path / "figures").mkdir()
    for figure in ("03_loss", "05_switch", "05_other"):
        (tmp_path / "figures" / f"{figure}.png").write_bytes(PNG)
    return tmp_path


RECORDS = {
    "03_train": dict(
        metrics={
            "addition_accuracy_before": {"value": 0.0, "low": 0.0, "high": 0.07, "n": 50},
            "addition_accuracy_after": {"value": 0.84, "low": 0.71, "high": 0.93, "n": 50},
            "plain": 3.0,
        },
        tables={"memory": [{"what": EVIL, "GiB": 1.5}]},
    ),
    "05_swap": dict(tables={"adapters": [{"adapter": "addition", "rank": 16}]}),
}


class Resources(HTMLParser):
    """What a page would fetch, what it links to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.links, self.tags, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(attributes["href"])
        self.fetched += [
            attributes[k] for k in ("src", "srcset", "data", "poster") if k in attributes
        ]
        if tag == "link":
            self.fetched.append(attributes["href"])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(folder):
    path = write_page(folder, [made(n, **f) for n, f in RECORDS.items()])
    assert path == folder / "index.html"
    return path.read_text()


def test_the_page_fetches_nothing(page):
    found = Resources(page)
    assert len(found.fetched) >= 3
    for address in found.fetched:
        assert address.startswith("data:image/png;base64,")
        assert base64.b64decode(address.split(",")[1]) == PNG
    assert not {"script", "iframe", "link", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", page)


def test_links_lead_to_what_is_there(page, folder):
    links = set(Resources(page).links)
    assert links == {"03_train.html", "03_train.ipynb", "05_swap.html", "05_swap.ipynb"}
    for link in links:
        assert (folder / link).exists()


def test_text_is_never_markup(page):
    found = Resources(page)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    text = " ".join(found.text)
    assert EVIL in text
    assert "Does it <learn>?" in text


def test_bars_before_and_after(page):
    bars = re.findall(r'class="bar (\w+)"><i style="width:([\d.]+)%"></i><span>([^<]*)', page)
    assert bars == [
        ("before", "0.0", "0 % (95 %: 0 to 7)"),
        ("after", "50.4", "84 % (95 %: 71 to 93)"),
    ]
    assert "<b>addition accuracy <span" in page


def test_what_was_run_and_on_what(page):
    text = " ".join(" ".join(Resources(page).text).split())
    assert "2 notebooks ran in 3.0 minutes" in text
    assert made("x").hardware["name"] in text
    assert f"torch {made('x').versions['torch']}" in text
    for part in ("03 · Train", "Memory", "Adapters on one base", "0.84 [0.71, 0.93] (n = 50)"):
        assert part in text


def test_gains_need_both_sides():
    plain = made("a", metrics={"x_before": 0.25, "y_before": 0.5, "z_after": 0.5, "x_after": 1.0})
    (only,) = gains([plain])
    assert (only["what"], only["study"]) == ("x", plain.study[:2])
    assert (only["before"], only["after"]) == (
        {"value": 25.0, "text": "25 %"},
        {"value": 100.0, "text": "100 %"},
    )
    # A before of one notebook and an after of another were not measured on the same questions.
    split = [made("a", metrics={"x_before": 0.1}), made("b", metrics={"x_after": 0.2})]
    assert gains(split) == []
    assert gains([]) == []


def test_a_page_without_figures_tables_or_gains(folder):
    for figure in (folder / "figures").iterdir():
        figure.unlink()
    html = write_page(folder, [made("03_train")]).read_text()
    found = Resources(html)
    assert found.fetched == []
    assert "Before and after" not in html
    assert "Adapters" not in html


def test_the_rendered_notebook_holds_its_cells(page, folder):
    assert "1 + 1" in re.sub(r"<[^>]+>", "", (folder / "03_train.html").read_text())
