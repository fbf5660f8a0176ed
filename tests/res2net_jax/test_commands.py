"""The command line as a user meets it: outputs, exit codes, messages."""

import asyncio
import csv
import io
import json
import os
import shutil
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import res2net_jax
from res2net_jax import command_line, files
from res2net_jax.__main__ import COMMANDS, command
from res2net_jax.overlay import overlay


@pytest.fixture(autouse=True)
def unraisable_hook(monkeypatch):
    """What the command line does to it ends with the test."""
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)


@pytest.fixture
def pictures(tmp_path, photos):
    """Five pictures in two folders, one of them broken, one with an awkward name."""
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    image = Image.open(photos[0])
    image.crop((0, 0, 200, 300)).save(root / "b/1.jpg")
    image.convert("L").rotate(90).save(root / "b/2.png")
    Image.open(photos[1]).save(root / os.fsdecode(b"<i>\xff.jpg"), "JPEG")
    (root / "img2.jpg").write_bytes(photos[0].read_bytes()[:20_000])
    image.save(root / "img10.jpg")
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*arguments)`` -> exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["res2net_jax", *map(str, arguments)])
        sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
        try:
            command_line.main(command)
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return (code, *capsys.readouterr())

    return run


GOOD = ["<i>\udcff.jpg", "b/1.jpg", "b/2.png", "img10.jpg"]


def test_predict_writes_what_classify_says_in_every_form(run, folder, pictures, tmp_path):
    expected = res2net_jax.classify(res2net_jax.load(folder), [pictures / name for name in GOOD], top_k=3)
    rows, lines = tmp_path / "new/rows.csv", tmp_path / "lines.jsonl"
    outputs = ["--csv", rows, "--json-lines", lines, "--html", tmp_path / "page.html", "--explain"]
    code, out, error = run("predict", folder, pictures, "--top-k", 3, "--batch-size", 3, *outputs)
    assert code == 0 and out == f"{tmp_path}/page.html\n"
    assert error.startswith("1 of 5 pictures could not be read and was left out:\n  ") and "img2.jpg: not a" in error
    rows = list(csv.reader(rows.read_text("utf-8", "surrogateescape").splitlines()))
    assert rows[0] == ["file", "rank", "index", "label", "probability"] and len(rows) == 1 + 4 * 3
    lines = [json.loads(line) for line in lines.read_text().splitlines()]
    for name, answer, line, row in zip(GOOD, expected, lines, rows[1::3], strict=True):
        assert line["file"] == row[0] == str(pictures / name)
        for prediction, written in zip(answer, line["predictions"], strict=True):
            assert (written["label"], written["index"]) == (prediction.label, prediction.index)
            assert written["probability"] == pytest.approx(prediction.probability, rel=1e-4)
        assert row[1:4] == ["1", str(answer[0].index), answer[0].label]
        assert float(row[4]) == pytest.approx(answer[0].probability, rel=1e-4)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count('class="card"') == 4 and page.count("data:image/jpeg;base64,") == 8
    assert "&lt;i&gt;?.jpg" in page and "1 picture could not be read" in page
    assert f"<h1>res2net50_26w_4s, {folder}</h1>" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.jsonl", "new", "page.html", "pictures"]


def test_predict_on_standard_output(run, folder, pictures):
    code, out, _ = run("predict", folder, pictures, "--json", "--top-k", 1)
    answers = json.loads(out)
    assert code == 0 and [answer["file"] for answer in answers] == [str(pictures / name) for name in GOOD]
    _, out, _ = run("predict", folder, pictures / "b", "--json-lines", "-", "--top-k", 1)
    for line, answer in zip(out.splitlines(), answers[1:3], strict=True):
        line = json.loads(line)
        assert line["file"] == answer["file"] and line["predictions"][0]["index"] == answer["predictions"][0]["index"]
    _, out, _ = run("predict", folder, pictures / "b", "--csv", "-", "--top-k", 20)
    assert len(list(csv.DictReader(io.StringIO(out)))) == 2 * 10  # classes
    code, out, _ = run("predict", folder, pictures, "--top-k", 1)
    assert code == 0 and out.splitlines()[0].endswith("<i>\\udcff.jpg") and len(out.splitlines()) == 8


def test_strict(run, folder, pictures):
    assert run("predict", folder, pictures, "--strict")[0] == 1
    assert run("predict", folder, pictures / "b", "--strict")[0] == 0
    assert run("explain", folder, pictures, "--output", pictures / "maps", "--strict")[0] == 1


def test_no_picture_can_be_read(run, folder, pictures, tmp_path):
    code, out, error = run("predict", folder, pictures / "img2.jpg", "--json")
    assert (code, out) == (2, "") and error.startswith(f"error: {pictures}/img2.jpg: not a picture that can be read")
    (pictures / "b/1.jpg").write_text("<html>")
    (pictures / "b/2.png").write_bytes(b"")
    code, _, error = run("predict", folder, pictures / "b", "--html", tmp_path / "page.html")
    assert code == 2 and "none of the 2 pictures can be read" in error and error.count("\n") == 3
    assert list(tmp_path.iterdir()) == [pictures]
    code, out, error = run("features", folder, pictures / "b", "--output", tmp_path / "f.npz")
    assert (code, out) == (2, "") and "no picture can be read" in error and error.count("\n") == 3
    assert {path.name for path in tmp_path.iterdir()} == {pictures.name, ".f.npz.lock"}


@pytest.mark.parametrize("form", ["--csv", "--json-lines", "--html"])
def test_an_output_that_exists(run, folder, pictures, tmp_path, form):
    file = tmp_path / "out"
    file.write_text("precious")
    code, _, error = run("predict", folder, pictures, form, file)
    assert code == 2 and f"{file} exists; --force replaces it" in error and file.read_text() == "precious"
    assert run("predict", folder, pictures / "b", form, file, "--force")[0] == 0 and file.read_text() != "precious"
    code, _, error = run("predict", folder, pictures / "b", form, tmp_path, "--force")
    assert code == 2 and "is a folder or a device" in error


def test_outputs_in_the_home_folder(run, folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(pictures)
    outputs = ["--csv", "~/a/1.csv", "--json-lines", "~/1.jsonl", "--html", "~/1.html"]
    assert run("predict", folder, "b/1.jpg", *outputs)[0] == 0
    assert run("explain", folder, "b/1.jpg", "--output", "~/maps")[0] == 0
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if pictures not in file.parents}
    assert {"a/1.csv", "1.jsonl", "1.html", "maps/1.png"} <= written and not (pictures / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "MODEL"], "no pictures given"),
        (["predict", "MODEL", "nowhere.jpg"], "no file or folder nowhere.jpg"),
        (["predict", "photo.jpg", "MODEL"], "holds a model, not pictures; the model comes first"),
        (["predict", "res2net50_14w8s", "PICTURES"], "did you mean res2net50_14w_8s"),
        (["predict", "MODEL", "PICTURES", "--top-k", "0"], "--top-k must be"),
        (["predict", "MODEL", "PICTURES", "--batch-size", "-1"], "--batch-size must be"),
        (["predict", "MODEL", "PICTURES", "--csv", "-", "--json"], "--csv and --json both write to standard output"),
        (["predict", "MODEL", "PICTURES", "--csv", "a", "--html", "a"], "two outputs cannot be one file"),
        (["predict", "MODEL", "PICTURES", "--csv", "a", "--html", os.path.abspath("a")], "two outputs cannot be one"),
        (["predict", __file__, "PICTURES"], "weights in a file go with the name of their model: load(NAME, source="),
        (["export", "MODEL", "m.stablehlo", "--size", "999999999"], "at most 16,384 each"),
        (["export", "MODEL", "m.stablehlo", "--out-indices", "1", "9"], "there is no feature 9; this model has"),
        (["predict", "MODEL", "PICTURES", "--explain"], "--explain goes with --html"),
        (
            ["explain", "MODEL", "PICTURES", "--output", "OUT", "--class", "10"],
            "no class 10; this model has 10, from 0",
        ),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--class", "taby"], "did you mean tabby"),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--class", "z"], "known are tabby, tabby cat, crane,"),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--class", "crane"], "index of one: 1 (crane), 2 (crane)"),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--stage", "layer3"], "has act1, layer1, layer2"),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--alpha", "2"], "alpha is a weight from 0 to 1"),
        (["explain", "MODEL", "PICTURES", "--output", __file__], "is not a folder; --output names the folder"),
        (["explain", "MODEL", "PICTURES"], "--output"),
        (["explain", "MODEL", "PICTURES", "--output", "OUT", "--method", "cam"], "gradcam++"),
        (["list", "vgg*"], "no model matches 'vgg*'"),
        (["info", "MODEL", "--size", "big"], "HEIGHTxWIDTH"),
        (["info", "nowhere/"], "there is no folder"),
        (["show"], "show"),
        (["predict", "MODEL", "PICTURES", "--bogus"], "--bogus"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(run, folder, pictures, tmp_path, arguments, message):
    stands = {"MODEL": folder, "PICTURES": pictures / "b", "OUT": tmp_path / "out"}
    code, out, error = run(*(stands.get(argument, argument) for argument in arguments))
    assert code == 2 and out == "" and message in " ".join(error.split()) and "Traceback" not in error
    assert list(tmp_path.iterdir()) == [pictures]


def test_what_is_no_mistake_of_the_user_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["res2net_jax"])
    with pytest.raises(TypeError, match="incompatible shapes"):
        command_line.main(lambda _: jnp.add(jnp.ones(3), jnp.ones(4)))


def test_debug_shows_the_traceback(run, folder):
    with pytest.raises(FileNotFoundError):
        run("predict", folder, "nowhere.jpg", "--debug")


def test_what_orbax_gives_up_is_not_shown(monkeypatch, capsys):
    class Late:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    def command(_):
        loop = asyncio.new_event_loop()
        loop.close()
        Late(lambda: loop.call_soon_threadsafe(print))
        Late(lambda: {}["another defect"])

    monkeypatch.setattr("sys.argv", ["res2net_jax"])
    command_line.main(command)
    error = capsys.readouterr().err
    assert "another defect" in error and "Event loop" not in error


@pytest.mark.parametrize("former", [signal.SIG_DFL, signal.SIG_IGN])
def test_sigterm_is_only_taken_from_the_default(monkeypatch, former):
    seen = []
    monkeypatch.setattr("sys.argv", ["res2net_jax"])
    before = signal.signal(signal.SIGTERM, former)
    try:
        command_line.main(lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
        assert signal.getsignal(signal.SIGTERM) == former
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen == [former]) == (former == signal.SIG_IGN)


@pytest.mark.parametrize("allocate", [jnp.zeros, np.zeros])
def test_more_memory_than_there_is(monkeypatch, capsys, tmp_path, allocate):
    monkeypatch.setattr("sys.argv", ["res2net_jax"])

    def command(_):
        with files.new_file(tmp_path / "answers.csv"):
            allocate((2**30, 2**20), np.float32)

    with pytest.raises(SystemExit) as exit:
        command_line.main(command)
    assert not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: not enough memory (") and "a smaller --batch-size" in error


def test_explain_draws_the_maps_of_the_library(run, folder, pictures, tmp_path):
    model = res2net_jax.load(folder)
    code, out, _ = run(
        "explain",
        folder,
        pictures,
        "--output",
        tmp_path / "maps",
        "--class",
        "TABBY",
        "--stage",
        "layer1",
        "--alpha",
        1,
    )
    assert code == 0 and len(out.splitlines()) == 4 and f"{tmp_path}/maps/b/1.png" in out and "tabby, tabby cat" in out
    transform = res2net_jax.preprocess(model.preprocessing)
    for name in ("b/1", "b/2", "img10"):
        picture = next(pictures.glob(name + ".*"))
        (heat,) = res2net_jax.explain(model, transform(picture)[None], stage="layer1", classes=0)
        with Image.open(tmp_path / f"maps/{name}.png") as drawn:
            assert drawn.size == (448, 448) and drawn.mode == "RGB"
            expected = np.asarray(overlay(drawn, np.asarray(heat), 1.0), int)
            assert np.abs(np.asarray(drawn, int) - expected).max() <= 2
    code, _, error = run("explain", folder, pictures, "--output", tmp_path / "maps")
    assert code == 2 and "exists; --force replaces it" in error
    assert run("explain", folder, pictures, "--output", tmp_path / "maps", "--force", "--class", "3")[0] == 0


def test_explain_overwrites_no_picture(run, folder, pictures, tmp_path):
    before = (pictures / "b/2.png").read_bytes()
    for output, force in ((pictures, []), (pictures, ["--force"]), (tmp_path / "link", ["--force"])):
        if output.name == "link":
            output.symlink_to(pictures)
        code, out, error = run("explain", folder, pictures, "--output", output, *force)
        assert (code, out) == (2, "") and f"{output}/b/2.png is one of the pictures" in error
    assert (pictures / "b/2.png").read_bytes() == before and len(list(pictures.rglob("*.png"))) == 1


def test_explain_draws_a_picture_once(run, folder, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures / "b")
    code, out, _ = run("explain", folder, "1.jpg", pictures / "b/1.jpg", "../b/1.jpg", "--output", tmp_path / "maps")
    assert code == 0 and len(out.splitlines()) == 1
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["1.png"]
    shutil.copy("1.jpg", "1.png")
    shutil.copy("1.jpg", "1.jpg.png")  # a name that another one's PNG would take
    code, out, _ = run("explain", folder, ".", "--output", tmp_path / "all")
    assert code == 0 and len(out.splitlines()) == len(list((tmp_path / "all").iterdir())) == 4


def test_list_and_info_as_json(run, folder, checkpoint_folder):
    models = json.loads(run("list", "*101*", "--json")[1])
    assert [model["name"] for model in models] == ["res2net101_26w_4s", "res2net101d"]
    assert models[1]["imagenet"]["top1"] == res2net_jax.get_variant("res2net101d").imagenet.top1
    known = json.loads(run("info", "res2net50d", "--json", "--cache-dir", folder.parent)[1])
    assert known["checkpoint"] is None and known["published"]["name"] == "res2net50d"
    assert known["params"] == known["published"]["params"] and known["cost"]["macs"] == known["published"]["macs"]
    another = json.loads(run("info", checkpoint_folder, "--json")[1])  # of the release's architecture
    assert another["published"] is None and another["params"] > 25_000_000
    assert "Published" not in run("info", checkpoint_folder)[1]
    ours = json.loads(run("info", folder, "--json", "--size", "32")[1])
    assert ours["num_classes"] == 10 and ours["published"] is None and ours["cost"]["height"] == 32
    assert ours["checkpoint"]["folder"] == str(folder) and not ours["checkpoint"]["certificate"]["certified"]


def test_help_begins_with_an_example(run):
    for arguments in ([], *([name] for name in COMMANDS)):
        code, out, _ = run(*arguments, "--help")
        example = out.split("\n\n")[1]
        assert code == 0 and example.startswith(f"python -m res2net_jax {' '.join(arguments)}".rstrip()), out


def test_the_version(run):
    assert run("--version")[:2] == (0, f"res2net_jax {res2net_jax.__version__}\n")
