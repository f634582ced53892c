"""One style, one save: whole files, told apart in grey and by colour-blind eyes."""

import itertools
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from lora_kit.errors import BadInputError
from lora_kit.figures import COLOURS, DASHES, MARKERS, figures_folder, save, use_style


@pytest.fixture
def figure():
    use_style()
    figure, axes = plt.subplots()
    axes.plot([0, 1], [1, 0])
    yield figure
    plt.close(figure)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def test_save_writes_one_whole_picture(figure, folder):
    path = save(figure, "03_loss")
    assert path == folder / "03_loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert os.listdir(folder) == ["03_loss.png"]


def test_the_same_figure_gives_the_same_bytes(figure, folder):
    first = save(figure, "a").read_bytes()
    assert save(figure, "b").read_bytes() == first


def test_a_failing_save_keeps_the_old_picture(figure, folder, monkeypatch):
    path = save(figure, "x")
    old = path.read_bytes()

    def fail(part, **_):
        Path(part).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        save(figure, "x")
    assert path.read_bytes() == old
    assert os.listdir(folder) == ["x.png"]


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a.png", "a b"])
def test_a_name_is_no_path(figure, folder, name):
    with pytest.raises(BadInputError, match="letters, digits"):
        save(figure, name)


def test_where_figures_go(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_FIGURES", str(tmp_path))
    assert figures_folder() == tmp_path
    monkeypatch.delenv("LORA_KIT_FIGURES")
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root / "notebooks")
    assert figures_folder() == root / "figures"
    monkeypatch.chdir(tmp_path)
    assert figures_folder() == tmp_path / "figures"


def luminance(colour):
    """Relative luminance (WCAG 2.2) of a hex colour."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_differ_without_colour():
    assert len(set(COLOURS)) == len(set(MARKERS)) == len(set(DASHES)) == len(COLOURS) == 7
    for one, two in itertools.pairwise(COLOURS):
        light, dark = sorted((luminance(one), luminance(two)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 1.25


def test_the_style_gives_each_line_its_own_marker_and_dash(figure):
    axes = figure.axes[0]
    lines = [axes.plot([0, 1], [i, i])[0] for i in range(3)]
    assert len({(x.get_color(), x.get_marker(), str(x.get_linestyle())) for x in lines}) == 3
    assert not axes.spines["top"].get_visible()
    assert plt.rcParams["image.cmap"] == "cividis"
