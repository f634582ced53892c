"""The adapter folder: names that are words, paths that stay inside, files of bearable size."""

import os

import pytest

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.serve.folder import adapter_folder, adapters_in, check_name

FILES = ("adapter_config.json", "adapter_model.safetensors")


def fake(folder, size=10):
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_bytes(b"x" * size)
    return folder


@pytest.fixture
def root(tmp_path):
    fake(tmp_path / "root" / "good")
    fake(tmp_path / "root" / "deep" / "inner")
    fake(tmp_path / "outside")
    return tmp_path / "root"


def test_what_lies_inside_is_found(root):
    assert adapter_folder(root, "good") == (root / "good").resolve()
    assert adapter_folder(root, "other", "good") == (root / "good").resolve()
    assert adapter_folder(root, "other", "deep/inner") == (root / "deep/inner").resolve()
    assert adapter_folder(root, "other", str(root / "good")) == (root / "good").resolve()
    os.symlink(root / "good", root / "alias")
    assert adapter_folder(root, "alias") == (root / "good").resolve()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside", "a/b", "a\\b", "a.b", "a b", "é", "x" * 65, "a\0b", None]
)
def test_names_that_are_no_words(root, name):
    with pytest.raises(BadInputError, match="must be letters, digits"):
        check_name(name)
    with pytest.raises(BadInputError, match="must be letters, digits"):
        adapter_folder(root, name)


@pytest.mark.parametrize(
    "path",
    ["../outside", "good/../../outside", ".", "..", "/etc", "deep/../..", "a\0b", "x" * 5000],
)
def test_paths_that_lead_outside(root, path):
    with pytest.raises(BadInputError, match="leads outside the adapter folder"):
        adapter_folder(root, "good", path)


def test_links_that_lead_outside(root, tmp_path):
    os.symlink(tmp_path / "outside", root / "link")
    with pytest.raises(BadInputError, match="leads outside"):
        adapter_folder(root, "link")
    half = root / "half"
    half.mkdir()
    (half / FILES[0]).write_text("{}")
    os.symlink(tmp_path / "outside" / FILES[1], half / FILES[1])
    with pytest.raises(BadInputError, match="leads outside"):
        adapter_folder(root, "half")
    os.symlink(root / "loop", root / "loop")
    with pytest.raises((BadInputError, NotAvailableError)):
        adapter_folder(root, "loop")
    found, left_out = adapters_in(root)
    assert list(found) == ["good"]
    assert len(left_out) == 2
    assert all("leads outside" in sentence for sentence in left_out)


def test_missing_files_and_too_large_ones(root):
    with pytest.raises(NotAvailableError, match=r"no adapter 'none': adapter_config\.json"):
        adapter_folder(root, "none")
    (root / "good" / FILES[1]).unlink()
    with pytest.raises(NotAvailableError, match=r"adapter_model\.safetensors is missing in good"):
        adapter_folder(root, "good")
    fake(root / "large", 2**20)
    with pytest.raises(BadInputError, match="has 2 MiB; this server takes 1 MiB at most"):
        adapter_folder(root, "large", most_bytes=2**20)
    assert adapters_in(root, most_bytes=2**20)[0] == {}


def test_no_folder(tmp_path):
    with pytest.raises(NotAvailableError, match="There is no adapter folder"):
        adapters_in(tmp_path / "none")
