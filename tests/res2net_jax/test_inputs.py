import io
import os
from pathlib import Path

import pytest

from res2net_jax.commands.inputs import find_pictures


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty files: only their names matter here."""
    names = ("img10.jpg", "img2.JPG", "b/1.png", "B/2.webp", "notes.txt", ".hidden.jpg", ".cache/3.jpg", "Ünï [1].jpeg")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs):
    return [os.fspath(path) for path in find_pictures(inputs)]


def stdin(monkeypatch, data: bytes):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_folders_are_walked_in_natural_order(folder):
    assert find_pictures([folder]) == [folder / name for name in names(".")]
    assert names(".") == ["B/2.webp", "b/1.png", "img2.JPG", "img10.jpg", "Ünï [1].jpeg"]
    assert names("b/") == ["b/1.png"]
    assert names(folder / ".cache") == [f"{folder}/.cache/3.jpg"]  # named, so not left out


def test_files_are_taken_in_the_order_given_whatever_their_name(folder):
    assert names("notes.txt", "b/1.png", "Ünï [1].jpeg", "b") == ["notes.txt", "b/1.png", "Ünï [1].jpeg", "b/1.png"]


def test_wildcards(folder):
    assert names("img*") == ["img2.JPG", "img10.jpg"]
    assert names("**/*.png", "?/*") == ["b/1.png", "B/2.webp", "b/1.png"]
    assert names("**") == names(".")


@pytest.mark.parametrize("data", [b"img10.jpg\nb\n\n", b"img10.jpg\0b\0", b"img10.jpg\r\nb"])
def test_standard_input(folder, monkeypatch, data):
    stdin(monkeypatch, data)
    assert names("img2.JPG", "-") == ["img2.JPG", "img10.jpg", "b/1.png"]


def test_standard_input_is_taken_by_the_letter(folder, monkeypatch):
    (folder / "new\nline*.png").touch()
    stdin(monkeypatch, b"new\nline*.png\0Un\xff.jpg\0" + "Ünï [1].jpeg".encode())
    (folder / os.fsdecode(b"Un\xff.jpg")).touch()
    assert names("-") == ["new\nline*.png", os.fsdecode(b"Un\xff.jpg"), "Ünï [1].jpeg"]


def test_a_link_to_a_folder_is_followed_but_not_in_circles(folder):
    (folder / "b/loop").symlink_to(folder)
    (folder / "b/other").symlink_to(folder / "B")
    assert names("b") == ["b/1.png", "b/loop/B/2.webp", *(f"b/loop/{n}" for n in names(".")[3:]), "b/other/2.webp"]


def test_what_means_no_pictures(folder, monkeypatch):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder empty holds no pictures; known are .jpg"):
        find_pictures([".", "empty"])
    with pytest.raises(ValueError, match=r"\*.gif matches nothing"):
        find_pictures(["*.gif"])
    with pytest.raises(ValueError, match="matches 1 files or folders, but no pictures"):
        find_pictures(["note*"])
    with pytest.raises(ValueError, match="no pictures given"):
        find_pictures([])
    with pytest.raises(FileNotFoundError, match="there is no file or folder photo.jpg"):
        find_pictures([Path("photo.jpg")])
    stdin(monkeypatch, b"img*\n")
    with pytest.raises(FileNotFoundError, match=r"img\*"):
        find_pictures(["-"])
    stdin(monkeypatch, b"\n")
    with pytest.raises(ValueError, match="standard input names no pictures"):
        find_pictures(["-"])
