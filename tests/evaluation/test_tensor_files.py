"""Files of tensors: every dtype and layout, and a one-line error for damaged or malicious files."""

import io
import json
import os
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from approx_attention import InputError
from approx_attention.evaluation import files as tensor_files
from approx_attention.evaluation import load_layers, load_tensors


def safetensors(path, arrays, header=None, trailing=b""):
    """Write a .safetensors file of (dtype, shape, bytes) by name, or with a given header."""
    entries, end = {}, 0
    for name, (dtype, shape, data) in arrays.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(x[2] for x in arrays.values()) + trailing)
    return path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("BF16", ml_dtypes.bfloat16),
        ("F16", np.float16),
        ("F64", np.float64),
    ],
)
def test_safetensors_of_every_floating_dtype(tmp_path, name, dtype):
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
    path = safetensors(tmp_path / "x.safetensors", {n: (name, [6, 4], x.tobytes()) for n in "qkv"})
    np.testing.assert_array_equal(load_tensors(path).query[0, :, 0], x.astype(np.float32))


def test_safetensors_as_the_package_writes_them(tmp_path):
    from safetensors.numpy import save_file

    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    save_file({"q": x, "k": x + 1, "v": x + 2, "n": np.arange(3)}, tmp_path / "x.safetensors", {"made": "here"})
    loaded = load_tensors(tmp_path / "x.safetensors")
    for i, read in enumerate(loaded):
        np.testing.assert_array_equal(read[0, :, 0], x + i)


def entry(dtype="F32", shape=(2, 4), offsets=(0, 32)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ENTRIES = {"q": entry(), "k": entry(offsets=(32, 64)), "v": entry(offsets=(64, 96))}


@pytest.mark.parametrize(
    "entries",
    [
        ENTRIES | {"v": entry(offsets=(64, 2**62))},
        ENTRIES | {"v": entry(offsets=(96, 64))},
        ENTRIES | {"v": entry(offsets=(-32, 0))},
        ENTRIES | {"v": entry(offsets=(0, 32))},
        ENTRIES | {"v": entry(shape=(2**40, 2**40), offsets=(64, 96))},
        ENTRIES | {"v": entry(shape=(-2, -4), offsets=(64, 96))},
        ENTRIES | {"v": entry(shape=("a",), offsets=(64, 96))},
        ENTRIES | {"v": entry(dtype="F4", offsets=(64, 96))},
        ENTRIES | {"v": entry(dtype=["F32"], offsets=(64, 96))},
        ENTRIES | {"v": {"dtype": "F32"}},
        ENTRIES | {"v": 3},
        {name: ENTRIES[name] for name in "qk"},
        [1, 2],
    ],
)
def test_headers_of_safetensors_that_do_not_fit(tmp_path, entries):
    path = tmp_path / "x.safetensors"
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(96))
    with pytest.raises(InputError, match="x.safetensors") as raised:
        load_tensors(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\1",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
    ],
)
def test_no_header_of_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a whole .safetensors file: "):
        load_tensors(path)


def npy(shape, dtype="<f4", data=b"", header=None):
    """The bytes of a .npy file that declares a given shape."""
    text = header or f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


def npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


GOOD = npy((2, 4), data=bytes(32))


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (npy((2**20, 2**20)), "declares shape"),
        (npy((2**62, 2**62)), "declares shape"),
        (npy((-2, 4), data=bytes(32)), "negative axis"),
        (npy((2, 4), data=bytes(31)), "ends early"),
        (npy((1,), "|O", data=bytes(8)), "pickled object"),
        (npy((1,), [("a", "|O")], data=bytes(8)), "pickled object"),
        (npy((1, 2), "<i8", data=bytes(16)), "floating point"),
        (npy((1, 2), "|V2", data=bytes(4)), "do not name bfloat16"),
        (npy((0, 4)), "is empty"),
        (npy((), header="(" * 5000), "not a whole .npz"),
        (npy((), header="-" * 9000 + "1"), "x.npz"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b"{", "not a whole .npz"),
        (b"\x93NUMPY\7\0", "format of numpy"),
        (b"no array", "not an array that numpy saved"),
        (b"", "not an array that numpy saved"),
    ],
)
def test_arrays_in_npz_that_do_not_fit(tmp_path, spoilt, told):
    path = npz(tmp_path / "x.npz", {"q": spoilt, "k": GOOD, "v": GOOD})
    with pytest.raises(InputError, match=told) as raised:
        load_tensors(path)
    assert "\n" not in str(raised.value)
    assert "x.npz" in str(raised.value)


def test_what_the_directory_of_a_zip_declares_is_held_against_it(tmp_path, monkeypatch):
    data = npz(tmp_path / "x.npz", {n: GOOD for n in "qkv"}).read_bytes()
    # The size of q in the central directory.
    at = data.index(b"PK\1\2") + 24
    (tmp_path / "x.npz").write_bytes(data[:at] + struct.pack("<I", 2**31) + data[at + 4 :])
    with pytest.raises(InputError, match="declares 2147483648 bytes, which"):
        load_tensors(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(data[: at - 4] + 2 * struct.pack("<I", 2**31) + data[at + 4 :])
    with pytest.raises(InputError, match="declares 2147483648 bytes, which"):
        load_tensors(tmp_path / "x.npz")
    # A small compressed file may need more memory than the machine has.
    bomb = npz(tmp_path / "y.npz", {n: npy((4096, 64), data=bytes(2**20)) for n in "qkv"}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10_000
    assert load_tensors(bomb).query.shape == (1, 4096, 1, 64)
    monkeypatch.setattr(tensor_files, "_memory", lambda: 2**19)
    with pytest.raises(InputError, match="more than the 0.000488 GiB of free memory"):
        load_tensors(bomb)


def test_files_cut_anywhere_and_other_things_than_files(tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 4)).astype(np.float32)
    np.savez_compressed(tmp_path / "x.npz", q=x, k=x, v=x)
    safetensors(tmp_path / "x.safetensors", {n: ("F32", [6, 4], x.tobytes()) for n in "qkv"})
    for suffix in (".npz", ".safetensors"):
        whole = (tmp_path / f"x{suffix}").read_bytes()
        load_tensors(tmp_path / f"x{suffix}")
        path = tmp_path / f"cut{suffix}"
        for cut in random.integers(1, len(whole), 20):
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError, match="not a whole"):
                load_tensors(path)
        for _ in range(60):  # damage in a name or a time may go unnoticed; all other damage is an InputError
            at = int(random.integers(len(whole)))
            path.write_bytes(whole[:at] + bytes([int(random.integers(256))]) + whole[at + 1 :])
            try:
                load_tensors(path)
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017
    safetensors(tmp_path / "long.safetensors", {n: ("F32", [6, 4], x.tobytes()) for n in "qkv"}, trailing=b"more")
    with pytest.raises(InputError, match="bytes for arrays, but they need"):
        load_tensors(tmp_path / "long.safetensors")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match="is no regular file"):
        load_tensors(tmp_path / "pipe.npz")
    (tmp_path / "wrong.npz").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(InputError, match="not a whole .npz"):
        load_tensors(tmp_path / "wrong.npz")


def test_numpy_reads_what_is_read(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "q": np.asfortranarray(random.normal(size=(6, 2, 4))),
        "k": random.normal(size=(6, 1, 4)).astype(">f4"),
        "v": random.normal(size=(6, 1, 4)).astype(np.longdouble),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    for x, expected in zip(load_tensors(tmp_path / "x.npz"), arrays.values(), strict=True):
        np.testing.assert_array_equal(x[0], expected.astype(np.float32))
    file = io.BytesIO()
    np.lib.format.write_array(file, arrays["q"], version=(2, 0))
    npz(tmp_path / "y.npz", {n: file.getvalue() for n in "qkv"})
    np.testing.assert_array_equal(load_tensors(tmp_path / "y.npz").key[0], arrays["q"].astype(np.float32))


# several layers, and padding


def layered(path, names, **more):
    random = np.random.default_rng(0)
    np.savez(path, **{name: random.normal(size=(2, 6, 1, 4)).astype(np.float32) for name in names}, **more)
    return path


@pytest.mark.parametrize("separator", [".", "/", "_"])
def test_layers_by_their_names(tmp_path, separator):
    prefixes = [f"model.layer{i}" for i in (10, 2, 0)] + ["model.head"]
    path = layered(tmp_path / "x.npz", [f"{prefix}{separator}{name}" for prefix in prefixes for name in "qkv"])
    loaded = load_layers(path, layers="model.layer*")
    assert list(loaded) == ["model.layer0", "model.layer2", "model.layer10"]
    np.testing.assert_array_equal(
        loaded["model.layer2"].tensors.key, np.load(path)[f"model.layer2{separator}k"].astype(np.float32)
    )
    assert list(load_layers(path, layers="model.layer[02]")) == ["model.layer0", "model.layer2"]
    assert list(load_layers(path, layers="*")) == ["model.head", "model.layer0", "model.layer2", "model.layer10"]
    with pytest.raises(InputError, match=r"has no layer 'body\*'.*its layers are 'model.head', 'model.layer0'"):
        load_layers(path, layers="body*")
    with pytest.raises(InputError, match="has no array 'q'.*or several layers with --layers"):
        load_tensors(path)


def test_names_below_a_layer_and_layers_with_brackets(tmp_path):
    path = layered(tmp_path / "x.npz", [f"h[{i}]/attn/{name}_proj" for i in range(2) for name in "qkv"])
    names = ("attn/q_proj", "attn/k_proj", "attn/v_proj")
    assert list(load_layers(path, names, layers="h*")) == ["h[0]", "h[1]"]
    assert list(load_layers(path, names, layers="h[0]")) == ["h[0]"]
    path = layered(tmp_path / "y.npz", ["a.q", "a.k", "a.v", "b.q", "b.k"])
    with pytest.raises(InputError, match="has no array 'b.v', which layer 'b' needs"):
        load_layers(path, layers="*")
    assert list(load_layers(path, layers="a")) == ["a"]
    layered(tmp_path / "z.npz", ["keys"])
    with pytest.raises(InputError, match=r"has no layer '\*' with arrays such as 'layer0.q' \(it contains 'keys'\)"):
        load_layers(tmp_path / "z.npz", layers="*")


@pytest.mark.parametrize("separator", "./_")
@pytest.mark.parametrize("others", [["rope{}k"], ["rope{}q", "rope{}k"], ["rope{}q", "rope{}k", "extra{}v"], []])
def test_arrays_that_end_like_those_of_a_layer(tmp_path, separator, others):
    own = [f"layer{i}{separator}{name}" for i in range(2) for name in "qkv"]
    more = [f"layer0{separator}{other.format('_')}" for other in others] + ["cache_k", "positions.q"]
    path = layered(tmp_path / "x.npz", [*own, *more])
    assert list(load_layers(path, layers="layer*")) == ["layer0", "layer1"]
    assert list(load_layers(path, layers="*")) == ["layer0", "layer1"]
    with pytest.raises(InputError, match=r"has no layer 'cache'.*its layers are 'layer0', 'layer1'\)$"):
        load_layers(path, layers="cache")


def test_advice_that_helps(tmp_path):
    np.savez(tmp_path / "x.npz")
    with pytest.raises(InputError, match="it is empty; save arrays in it"):
        load_layers(tmp_path / "x.npz")


def test_lengths_and_masks_of_all_layers_or_of_each(tmp_path):
    names = [f"layer{i}.{name}" for i in range(2) for name in "qkv"]
    mask = np.arange(6) < np.array([[4], [6]])
    path = layered(
        tmp_path / "x.npz", names, lengths=np.array([6, 3]), mask=mask, **{"layer1.lengths": np.array([2, 6])}
    )
    both = load_layers(path, layers="layer*", lengths="lengths")
    assert [layer.kv_mask.sum(1).tolist() for layer in both.values()] == [[6, 3], [2, 6]]
    both = load_layers(path, layers="layer*", lengths="lengths", mask="mask")
    assert [layer.kv_mask.sum(1).tolist() for layer in both.values()] == [[4, 3], [2, 6]]
    with pytest.raises(InputError, match="has no array 'length'; did you mean 'lengths'.*name yours with --lengths"):
        load_layers(path, layers="layer*", lengths="length")
    with pytest.raises(InputError, match="'layer0.q' in .*lengths must be integers, got dtype float32"):
        load_layers(path, layers="layer*", lengths="q")


def test_padding_may_hold_anything(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 6, 1, 4)).astype(np.float32)
    x[1, 4:] = np.nan
    np.savez(tmp_path / "x.npz", q=x, k=x, v=x, lengths=np.array([6, 4]), more=np.array([6, 5]))
    load_layers(tmp_path / "x.npz", lengths="lengths")
    for given in ({}, {"lengths": "more"}):
        with pytest.raises(InputError, match=r"the first nan at \[1, 4, 0, 0\]"):
            load_layers(tmp_path / "x.npz", **given)
