"""Against a local hub, by the hub's real client."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, commit_sha
from PIL import Image

import porting.export
import res2net_jax
from res2net_jax import checkpoint, hub, sharing
from res2net_jax.metadata import describe, read_metadata
from res2net_jax.model_card import model_card
from res2net_jax.variants import VARIANTS, Preprocessing

TINY = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "scale": 3, "num_classes": 2, "zero_init_last": False}


@pytest.fixture(scope="module")
def model():
    model = res2net_jax.create("res2net50_26w_4s", **TINY).eval()
    model.reset_classifier(2, class_names=["chat écaille", "dog"])
    colours = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    model.preprocessing = Preprocessing(size=64, crop_pct=0.9, interpolation="bicubic", **colours)
    return model


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("RES2NET_JAX_HOME", str(tmp_path / "home"))


def same(a, b):
    a, b = checkpoint.arrays(a), checkpoint.arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_model_goes_to_the_hub_and_comes_back(hub_server, model):
    address = res2net_jax.push_to_hub(model, "me/cats", token=TOKEN, license="apache-2.0")
    assert address == f"{hub_server.url}/me/cats/commit/{commit_sha('me/cats', 'main', 1)}"
    (commit,) = hub_server.commits("me/cats")  # one, with everything
    assert {path.split("/")[0] for path in commit} == {"README.md", "checkpoint", "config.json", "model.safetensors"}
    loaded = res2net_jax.load("hf://me/cats")
    assert same(loaded, model) and loaded.arch == model.arch and loaded.bn1.use_running_average
    assert (loaded.class_names, loaded.preprocessing) == (model.class_names, model.preprocessing)
    assert res2net_jax.load("hf://me/cats", num_classes=5, dtype=jnp.bfloat16).num_classes == 5

    other = res2net_jax.create("res2net50_26w_4s", rngs=1, **TINY).eval()
    res2net_jax.push_to_hub(other, "me/cats", token=TOKEN)
    assert same(res2net_jax.load("hf://me/cats"), other)
    assert same(res2net_jax.load(f"hf://me/cats@{commit_sha('me/cats', 'main', 1)}"), model)
    first, second = hub_server.commits("me/cats")
    assert len(first) == len(second)  # nothing is left of the checkpoint before


def test_a_branch_and_a_private_repository(hub_server, model):
    res2net_jax.push_to_hub(model, "me/secret", token=TOKEN, private=True, revision="v2")
    assert hub_server.private == {"me/secret"} and hub_server.commits("me/secret") == []
    with pytest.raises(FileNotFoundError, match="the hub has no me/secret, or it is private: log in"):
        res2net_jax.load("hf://me/secret@v2")
    hub_server.private.clear()
    assert same(res2net_jax.load("hf://me/secret@v2"), model)
    with pytest.raises(ValueError, match="holds no checkpoint by res2net_jax.push_to_hub"):
        res2net_jax.load("hf://me/secret")


def test_timm_loads_what_was_pushed(hub_server, model, photos, tmp_path):
    import timm

    res2net_jax.push_to_hub(model, "me/cats", token=TOKEN)
    theirs = timm.create_model("hf-hub:me/cats", pretrained=True, cache_dir=str(tmp_path / "timm")).eval()
    assert theirs.pretrained_cfg["label_names"][1] == "dog"
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    expected = transform(Image.open(photos[0])).numpy().transpose(1, 2, 0)
    assert np.array_equal(res2net_jax.preprocess(model)(photos[0]), expected)
    x = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype("float32")
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = np.asarray(jax.jit(lambda model, x: model(x))(model, x))
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()

    two_stages = {"layers": (1, 1), "channels": (8, 16)}
    for options in ({"attn_layer": "se"}, {"aa_layer": "avg"}, two_stages):  # which timm's config cannot name
        other = res2net_jax.create("res2net50_26w_4s", **(TINY | options)).eval()
        res2net_jax.push_to_hub(other, "me/other", token=TOKEN)
        assert hub_server.commits("me/other")[-1].keys().isdisjoint({"config.json", "model.safetensors"})
        assert res2net_jax.load("hf://me/other").arch == other.arch
        res2net_jax.push_to_hub(model, "me/other", token=TOKEN)  # whose files for timm the next one must not keep


def test_without_network_the_cache_serves(hub_server, model, monkeypatch):
    from huggingface_hub import constants

    res2net_jax.push_to_hub(model, "me/cats", token=TOKEN)
    res2net_jax.load("hf://me/cats")
    requests = len(hub_server.requests)
    hub_server.fail["."] = 503
    assert same(res2net_jax.load("hf://me/cats"), model)
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert same(res2net_jax.load("hf://me/cats"), model)
    with pytest.raises(ConnectionError, match="cannot reach the hub for me/dogs, and the cache does not have it"):
        res2net_jax.load("hf://me/dogs")
    with pytest.raises(ConnectionError, match="cannot reach the hub for me/dogs"):
        res2net_jax.push_to_hub(model, "me/dogs", token=TOKEN)
    assert len(hub_server.requests) <= requests + 5


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/cats", None, r"the hub does not let you write me/cats \(HTTP 401\): log in"),
        ("me/cats", "hf_wrong", r"\(HTTP 401\)"),
        ("you/cats", TOKEN, r"the hub does not let you write you/cats \(HTTP 403\): log in .* as somebody who may"),
    ],
)
def test_who_may_not_write(hub_server, model, repo, token, message):
    with pytest.raises(PermissionError, match=message) as caught:
        res2net_jax.push_to_hub(model, repo, token=token)
    assert "\n" not in str(caught.value) and hub_server.repos == {}


@pytest.mark.parametrize("path", ["/lfs/", "/preupload/", "/commit/", "lfs/objects/batch"])
def test_a_hub_that_fails_half_way_has_nothing(hub_server, model, path):
    hub_server.fail[path] = 507
    with pytest.raises(ConnectionError, match="the hub failed to write me/cats: ") as caught:
        res2net_jax.push_to_hub(model, "me/cats", token=TOKEN)
    assert "\n" not in str(caught.value) and hub_server.commits("me/cats") == []


def test_what_is_no_address(hub_server, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="the hub has no me/nothing"):
        res2net_jax.load("hf://me/nothing")
    res2net_jax.push_to_hub(model, "me/cats", token=TOKEN)
    with pytest.raises(FileNotFoundError, match="me/cats has no revision v9"):
        res2net_jax.load("hf://me/cats@v9")
    for address in ("hf://cats", "hf://me/cats/more", "hf://me/cats@"):
        with pytest.raises(ValueError, match="expected hf://user/name"):
            res2net_jax.load(address)
    with pytest.raises(ValueError, match="source= goes with a model name"):
        res2net_jax.load("hf://me/cats", source="x")
    for name in ("cats", "a b/c", "me/cats/more"):
        with pytest.raises(ValueError, match=name):
            res2net_jax.push_to_hub(model, name, token=TOKEN)
    with pytest.raises(ValueError, match="fused"):
        res2net_jax.push_to_hub(res2net_jax.fuse(model), "me/fused", token=TOKEN)
    assert not hub_server.commits("me/fused")


def card_of(commit):
    head, _, text = commit["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), text


CERTIFICATE = {
    "certified": True,
    "reference": "timm 1, torch 2",
    "error": {"float64": {"224x224": {"stem": 1e-15, "logits": 3e-14}}},
    "versions": {},
}


def test_the_card_of_somebody_s_own_model(hub_server, model, tmp_path):
    source = {"trained by": "python -m train.imagenet", "dataset": "folder:/home/me/cats"}
    folder = checkpoint.save(model, tmp_path / "m", source=source)
    res2net_jax.push_to_hub(folder, "me/cats", token=TOKEN, license="cc-by-4.0", revision="v1")
    head, text = card_of(hub_server.commits("me/cats", "v1")[0])
    assert head["license"] == "cc-by-4.0" and "model-index" not in head and "datasets" not in head
    assert head["library_name"] == "res2net_jax" and {"res2net", "jax", "timm"} <= set(head["tags"])
    assert 'res2net_jax.load("hf://me/cats@v1")' in text and 'timm.create_model("hf-hub:me/cats"' in text
    assert "- dataset: folder:cats" in text and "cc-by-4.0, as stated by whoever shared the weights" in text
    assert "Its accuracy has not been stated" in text and "Not certified" in text and "layers = (1, 1, 1, 1)" in text
    parameters = sum(a.size for path, a in checkpoint.arrays(model).items() if not path.endswith((".mean", ".var")))
    assert f"| parameters | {parameters:,} |" in text
    source["dataset"] = "folder:cats"
    assert read_metadata(sharing.fetch("hf://me/cats@v1"))["source"] == source

    measured = describe(model, source=source | {"evaluation": {"top1": 91.25, "top5": 100.0, "loss": 0.3}})
    head = yaml.safe_load(model_card(measured, "hf://me/cats").split("---")[1])
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"]["name"] == "folder:cats" and "license" not in head
    assert [(metric["name"], metric["value"]) for metric in result["metrics"]] == [("top-1", 91.25), ("top-5", 100.0)]


@pytest.fixture
def release(monkeypatch):
    """The name of a small model whose weights are in the cache, as a release leaves them."""
    name = "res2net50_48w_2s"
    small = dataclasses.replace(VARIANTS[name].arch, layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))
    monkeypatch.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], arch=small))
    source = {"origin": f"hf://timm/{name}.in1k", "sha256": "0" * 64}
    checkpoint.save(res2net_jax.create(name), hub.cache_folder(name), source=source, certificate=CERTIFICATE)
    return name


def test_the_card_of_released_weights(hub_server, release):
    """Their licence and certificate go with them, also from a model that was loaded by its name."""
    name = release
    for given in (name, res2net_jax.load(name)):
        res2net_jax.push_to_hub(given, "me/copy", token=TOKEN)
        head, text = card_of(hub_server.commits("me/copy")[-1])
        assert (head["license"], head["license_name"]) == ("other", "res2net-non-commercial")
        assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 77.528
        assert "non-commercial use" in text and "| float64 224x224 | 1e-15 | 3e-14 |" in text
    with pytest.raises(ValueError, match="which keep their licence; leave license out"):
        res2net_jax.push_to_hub(name, "me/copy", token=TOKEN, license="mit")
    assert len(hub_server.commits("me/copy")) == 2
    assert read_metadata(sharing.fetch("hf://me/copy"))["certificate"] == CERTIFICATE
    config = json.loads(hub_server.commits("me/copy")[-1]["config.json"])
    assert config["architecture"] == name and config["model_args"] == {}


@pytest.mark.parametrize(
    "source",
    [
        {"origin": "res2net50_48w_2s-afed724a.pth", "sha256": "0" * 64},  # in name alone
        {"origin": "hf://timm/res2net50_48w_2s.in1k-flowers@main"},
        {"origin": "hf://mytimm/res2net50_48w_2s.in1k@main"},
    ],
    ids=str,
)
def test_the_card_of_weights_that_are_called_like_a_release(source):
    variant = VARIANTS["res2net50_48w_2s"]
    assert variant.pth == "res2net50_48w_2s-afed724a.pth" and variant.hub_id == "timm/res2net50_48w_2s.in1k"
    metadata = describe(res2net_jax.create(variant.name), source=source)
    assert "model-index" not in model_card(metadata, "hf://me/mine", license="mit")
    whole = {"origin": "mine.pth", "sha256": "afed724a" + "0" * 56}
    places = f"hf://{variant.hub_id}", f"hf://{variant.hub_id}@main", f"https://hub/{variant.hub_id}/resolve/main/m"
    for released in (whole, *({"origin": place} for place in places)):
        assert "model-index" in model_card(metadata | {"source": released}, "hf://me/mine")


def test_what_is_nobody_s_business_is_not_pushed(hub_server, model, tmp_path):
    """As checkpoints by earlier versions still have it."""
    for number, (origin, left) in enumerate(
        [
            ("https://me:secret@host/x.safetensors?signature=secret", "https://host/x.safetensors"),
            (str(tmp_path / "x.pth"), "x.pth"),
        ]
    ):
        folder = checkpoint.save(model, tmp_path / str(number), source={"origin": origin})
        assert sharing._described(folder)[1]["source"] == {"origin": left}


def test_the_card_of_weights_that_began_as_released_ones(hub_server, release, tmp_path):
    """Through other classifiers and checkpoints they keep the terms, but neither figures nor certificate."""
    trained = res2net_jax.load(release, num_classes=2, param_dtype="bfloat16")
    trained.fc.bias[...] += 1
    again = res2net_jax.load(res2net_jax.save(trained, tmp_path / "a"))
    again.reset_classifier(3)
    folder = res2net_jax.save(again, tmp_path / "b", source={"trained by": "me"})
    assert read_metadata(folder)["source"] == {"trained by": "me", "derived from": release}
    for given in (folder, res2net_jax.load(folder)):
        res2net_jax.push_to_hub(given, "me/tuned", token=TOKEN)
        head, text = card_of(hub_server.commits("me/tuned")[-1])
        assert (head["license"], head["license_name"]) == ("other", "res2net-non-commercial")
        assert head["base_model"] == f"timm/{release}.in1k" and "model-index" not in head
        assert f"The weights began as those of {release}, which" in text and "Not certified" in text
    assert res2net_jax.load("hf://me/tuned").derived_from == release
    res2net_jax.push_to_hub(folder, "me/tuned", token=TOKEN, license="cc-by-nc-4.0")
    head, text = card_of(hub_server.commits("me/tuned")[-1])
    assert head["license"] == "cc-by-nc-4.0" and "license_name" not in head
    assert f"cc-by-nc-4.0, as stated by whoever shared the weights. The weights began as those of {release}" in text
    elsewhere = res2net_jax.save(again, tmp_path / "c", source={"origin": "https://mylab.org/flowers"})
    assert res2net_jax.load(elsewhere).derived_from == release
    odd = res2net_jax.save(res2net_jax.create(release), tmp_path / "d", source={"origin": None, "derived from": [1]})
    assert res2net_jax.load(odd).derived_from is None
    porting.load_state_dict(again, porting.state_dict(again))  # somebody's, for all that is known
    assert again.derived_from is None
    other = tmp_path / "other.safetensors"  # somebody's own weights of the same architecture
    porting.export.write(res2net_jax.create(release), other)
    assert res2net_jax.load(release, source=other).derived_from is None
