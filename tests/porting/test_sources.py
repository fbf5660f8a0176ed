import argparse
import hashlib
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

import porting
from porting.hashing import published_prefix


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.standard_normal((4, 3, 7, 7)).astype("float32"),
        "bn1.weight": rng.standard_normal(4).astype("float32"),
        "bn1.num_batches_tracked": np.asarray(7),
    }


@pytest.fixture(scope="module")
def tensors(arrays):
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


def test_every_format_and_wrapping_gives_the_same_arrays(tmp_path, arrays, tensors):
    other = {key: value * 0 for key, value in tensors.items()}
    prefixed = {f"module._orig_mod.{key}": value for key, value in tensors.items()}
    contents = {
        "bare": tensors,
        "parallel": {f"module.{key}": value for key, value in tensors.items()},
        "nested": {"state_dict": prefixed, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "ema": {"state_dict_ema": tensors, "state_dict": other},
        "model_ema": {"model_ema": tensors, "model": other},
        "model": {"model": prefixed},
        "parameters": {key: torch.nn.Parameter(value, value.is_floating_point()) for key, value in tensors.items()},
    }
    for name, content in contents.items():
        for zip_format in (True, False):
            file = tmp_path / f"{name}-{'zip' if zip_format else 'legacy'}.pth"
            torch.save(content, file, _use_new_zipfile_serialization=zip_format)
            assert (file.read_bytes()[:2] == b"PK") == zip_format
            assert same(porting.read(file), arrays), file.name
    save_file(arrays, tmp_path / "model.safetensors")
    assert same(porting.read(tmp_path / "model.safetensors"), arrays)
    assert same(porting.read(str(tmp_path / "model.safetensors")), arrays)


def test_bfloat16_tensors_become_float32(tmp_path):
    torch.save({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "half.pth")
    assert same(porting.read(tmp_path / "half.pth"), {"a": np.array([1.5, -2.0], "float32")})


def test_the_hash_in_the_name_is_checked(tmp_path, tensors, arrays):
    torch.save(tensors, tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    right, wrong = tmp_path / f"x-{digest[:8]}.pth", tmp_path / "x-00000000.pth"
    for file in (right, wrong):
        file.write_bytes((tmp_path / "x.pth").read_bytes())
    assert same(porting.read(right), arrays)
    with pytest.raises(ValueError, match=f"SHA-256 begins with {digest[:8]}, not 00000000.*--no-check-hash"):
        porting.read(wrong)
    assert same(porting.read(wrong, check_hash=False), arrays)
    assert published_prefix("res2net50_14w_8s-6527dddc.pth") == "6527dddc"
    assert published_prefix("https://a.b/c-6527dddc.pth?download=true") == "6527dddc"
    assert published_prefix("model.safetensors") is None


class Command:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/res2net_jax_was_run",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, tensors, zip_format):
    torch.save({"state_dict": tensors, "x": Command()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match="system.*could run code"):
        porting.read(tmp_path / "x.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Command()))
    with pytest.raises(ValueError, match="damaged|could run code"):
        porting.read(tmp_path / "plain.pth")
    import pathlib

    assert not pathlib.Path("/tmp/res2net_jax_was_run").exists()


def test_a_legacy_file_cut_between_its_pickles(tmp_path, tensors):
    file = tmp_path / "legacy.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    with open(file, "rb") as opened:
        pickle.load(opened)  # the magic number
        whole = opened.tell()
    file.write_bytes(file.read_bytes()[:whole])
    with pytest.raises(ValueError, match="legacy.pth is damaged or truncated: "):
        porting.read(file)


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.99])
def test_truncated_files(tmp_path, tensors, arrays, fraction):
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(arrays, tmp_path / "model.safetensors")
    for file in ("zip.pth", "legacy.pth", "model.safetensors"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(ValueError, match=f"{file} is damaged or truncated"):
            porting.read(tmp_path / file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Not Found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"GIF89a........", "neither a PyTorch nor a safetensors file"),
    ],
)
def test_what_is_no_weights_file(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        porting.read(tmp_path / "x.pth")


def test_a_flipped_bit_in_a_pth(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(100_000)}, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match="x.pth is damaged or truncated: x/data/0"):
        porting.read(file)


def test_bits_flipped_in_the_directory_of_a_pth(tmp_path):
    """Either it is noticed, or the numbers are the same."""
    file = tmp_path / "x.pth"
    torch.save({"a": torch.arange(3.0)}, file)
    sound = file.read_bytes()
    for at in range(len(sound) - 400, len(sound)):
        content = bytearray(sound)
        content[at] ^= 1 << at % 8
        file.write_bytes(content)
        try:
            found = porting.read(file)
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert same(found, {"a": np.arange(3, dtype="float32")}), at


def test_a_zip_that_is_larger_than_it_looks(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="x.pth is damaged or truncated: its parts are larger than itself"):
        porting.read(tmp_path / "x.pth")


def test_what_else_a_pth_may_hold(tmp_path):
    for tensor in (
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, 3).to_sparse(),
    ):
        torch.save({"a": tensor}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="x.pth: 'a' is a tensor that numpy does not have"):
            porting.read(tmp_path / "x.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors \(torch.nn.modules.linear.Linear\)"):
        porting.read(tmp_path / "x.pth")


def test_numbers_that_numpy_has_not(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="m.safetensors holds numbers of a type that numpy does not have"):
        porting.read(tmp_path / "m.safetensors")


def test_a_file_without_a_state_dict(tmp_path, tensors):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict but list"):
        porting.read(tmp_path / "list.pth")
    torch.save({"epoch": 3, "weights": tensors}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="'epoch' is a int, not a tensor"):
        porting.read(tmp_path / "odd.pth")
    torch.save({1: tensors["bn1.weight"]}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="its keys are not names, one is 1"):
        porting.read(tmp_path / "numbers.pth")
    torch.save({"a": tensors["bn1.weight"], "module.a": tensors["bn1.weight"]}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="'a' twice"):
        porting.read(tmp_path / "twice.pth")


def test_a_header_whose_length_looks_like_markup(tmp_path):
    """15392 = 0x3c20: the file begins with b" <"."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(15392)
    content = len(header).to_bytes(8, "little") + header + np.float32(7).tobytes()
    assert content[:2] == b" <"
    (tmp_path / "m.safetensors").write_bytes(content)
    assert same(porting.read(tmp_path / "m.safetensors"), {"a": np.array([7], "float32")})


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="a URL, or a hub id"):
        porting.read(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no file weights/none.pth"):
        porting.read("weights/none.pth")
    with pytest.raises(ValueError, match="is a folder"):
        porting.read(tmp_path)
