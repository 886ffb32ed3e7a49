import io
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
import torch

import revdata
from revdata import DamagedDataError
from revdata.unpickle import unpickle


class Call:
    """Pickles as a call of a function, which happens when it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def test_reads_what_python_2_and_3_wrote(small):
    for name, content in small.files.items():
        record = unpickle(content, name)
        expected = pickle.loads(content, encoding="latin1")
        assert record.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(record[key], value), key


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (4, 3072), (2, 3, 4)])
def test_arrays_come_back(protocol, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    record = unpickle(pickle.dumps({"data": array}, protocol), "test")
    assert record["data"].dtype == np.uint8
    assert np.array_equal(record["data"], array)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "function",
    [os.system, os.mkdir, eval, exec, getattr, np.load, np.full, subprocess.Popen, torch.load],
)
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, protocol, function):
    target = tmp_path / "owned"
    argument = str(target) if function is os.mkdir else f"__import__('os').mkdir({str(target)!r})"
    attack = {"data": Call(function, argument), "labels": [1]}
    with pytest.raises(DamagedDataError, match=r"was not read"):
        unpickle(pickle.dumps(attack, protocol), "evil")
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"cbuiltins\neval\n(S'1'\ntR.", id="text opcodes"),
        pytest.param(b"c__builtin__\neval\n(S'1'\ntR.", id="python 2 name"),
        pytest.param(b"(S'1'\nibuiltins\neval\n.", id="INST"),
        pytest.param(b"cnumpy\nndarray.__reduce__\n.", id="attribute of an admitted name"),
        pytest.param(b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", id="dotted name"),
        pytest.param(b"cnumpy\nndarray\n}S'__call__'\nI1\nsb.", id="state for an admitted name"),
        pytest.param(b"cnumpy\nndarray\n)R.", id="call of ndarray"),
        pytest.param(b"cnumpy\nndarray\n)\x81.", id="NEWOBJ of ndarray"),
        pytest.param(b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", id="objects in an array"),
        pytest.param(b"c_codecs\nencode\n(Vx\nVrot13\ntR.", id="another codec"),
        pytest.param(b"Pname\n.", id="persistent id"),
        pytest.param(b"c_codecs\nencode\n(cbuiltins\neval\nVlatin1\ntR.", id="in an argument"),
        pytest.param(b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\ntR.", id="a new object"),
        pytest.param(b"cbuiltins\nlist\n)\x81.", id="a harmless class"),
        pytest.param(b"ctorch\nTensor\n.", id="a class of torch"),
        pytest.param("c\u043es\nsystem\n.".encode(), id="a name that looks alike"),
        pytest.param(b"\x8d" + (2**62).to_bytes(8, "little"), id="a length beyond all memory"),
        pytest.param(b"\x82\x01.", id="extension code"),
    ],
)
def test_opcodes_that_reach_further_are_refused(content):
    with pytest.raises(DamagedDataError, match="was not read"):
        unpickle(content, "evil")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype=np.float32),
        np.array([print, None], dtype=object),
        np.asfortranarray(np.zeros((3, 2), dtype=np.uint8)),
    ],
    ids=["floats", "objects", "fortran order"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(DamagedDataError):
        unpickle(pickle.dumps({"data": array}, protocol=2), "test")


def test_a_pickle_cut_short_anywhere_is_refused(small):
    name = "batches.meta" if "batches.meta" in small.files else "meta"
    content = small.files[name]
    for length in range(len(content)):
        with pytest.raises(DamagedDataError, match=name):
            unpickle(content[:length], name)


def test_something_else_than_a_dictionary_is_refused():
    with pytest.raises(DamagedDataError, match="no dictionary"):
        unpickle(pickle.dumps([1, 2], protocol=2), "test")


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_load_runs_nothing_that_a_data_set_brings_along(small, tmp_path, packed):
    target = tmp_path / "owned"
    evil = pickle.dumps({"data": Call(os.mkdir, str(target)), "labels": [0]}, protocol=2)
    for name in small.files:
        files = {**small.files, name: evil}
        root = tmp_path / name
        (root / small.folder).mkdir(parents=True)
        if packed:
            with tarfile.open(root / small.archive, "w:gz") as tar:
                for key, content in files.items():
                    member = tarfile.TarInfo(f"{small.folder}/{key}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        else:
            for key, content in files.items():
                (root / small.folder / key).write_bytes(content)
        # The unpickler stays on where checksums are not asked for.
        with pytest.raises(DamagedDataError, match=f"{name}.* was not read"):
            revdata.load(small.name, "train", root=root, verify=False)
        assert not target.exists()
