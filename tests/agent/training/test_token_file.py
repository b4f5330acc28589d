"""Token files: the bytes are those of the public layout, and an index that is damaged anywhere is refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.training import token_file
from agent.training.corpus_cache import CorpusError
from agent.training.token_file import DTYPES, LONGEST, Writer, paths, read

# Three sequences in two documents, written out by hand from the layout in Megatron-LM's indexed_dataset.py.
BIN = bytes([1, 0, 2, 0, 3, 0, 0xFF, 0xFF, 7, 0])
IDX = (
    b"MMIDIDX\x00\x00"
    b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
    b"\x08"  # uint16
    b"\x03\x00\x00\x00\x00\x00\x00\x00"  # sequences
    b"\x03\x00\x00\x00\x00\x00\x00\x00"  # entries of the document index
    b"\x03\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00"  # lengths
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00"  # pointers
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"  # documents
)
LENGTHS, POINTERS, DOCUMENTS = 34, 34 + 12, 34 + 12 + 24


def lay(folder: Path, idx: bytes = IDX, data: bytes = BIN) -> Path:
    prefix = folder / "wiki.en"
    prefix.with_name("wiki.en.bin").write_bytes(data)
    prefix.with_name("wiki.en.idx").write_bytes(idx)
    return prefix


def patched(offset: int, form: str, value: int) -> bytes:
    part = struct.pack(form, value)
    return IDX[:offset] + part + IDX[offset + len(part) :]


def test_the_hand_made_file_is_read(tmp_path: Path) -> None:
    file = read(lay(tmp_path))
    assert (file.data.name, file.index.name, file.dtype) == ("wiki.en.bin", "wiki.en.idx", np.uint16)
    assert file.ids().tolist() == [1, 2, 3, 65535, 7]
    assert file.documents.tolist() == [0, 4, 5]
    assert file.documents.dtype == np.int64


def test_the_writer_makes_the_bytes_of_the_layout(tmp_path: Path) -> None:
    with Writer(tmp_path / "one", np.dtype("<u2")) as writer:
        writer.add([1, 2, 3])
        writer.add(np.array([65535, 7]))
    assert (tmp_path / "one.bin").read_bytes() == BIN
    by_hand = (
        IDX[:18]
        + struct.pack("<QQ", 2, 3)
        + struct.pack("<2i", 3, 2)
        + struct.pack("<2q", 0, 6)
        + struct.pack("<3q", 0, 1, 2)
    )
    assert (tmp_path / "one.idx").read_bytes() == by_hand


@settings(max_examples=60, deadline=None)
@given(code=st.sampled_from(sorted(DTYPES)), data=st.data())
def test_what_is_written_is_read_in_every_type(
    tmp_path_factory: pytest.TempPathFactory, code: int, data: st.DataObject
) -> None:
    limits = np.iinfo(DTYPES[code])
    document = st.lists(st.integers(int(limits.min), int(limits.max)), max_size=6)
    documents = data.draw(st.lists(document, min_size=1, max_size=5).filter(any))
    prefix = tmp_path_factory.mktemp("tokens") / "x"
    with Writer(prefix, DTYPES[code]) as writer:
        for one in documents:
            writer.add(one)
    file = read(prefix)
    assert file.dtype == DTYPES[code]
    assert [file.ids()[a:b].tolist() for a, b in zip(file.documents, file.documents[1:], strict=False)] == documents


def test_a_long_document_is_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.iinfo(np.int32).max == LONGEST
    monkeypatch.setattr(token_file, "LONGEST", 3)
    with Writer(tmp_path / "x", DTYPES[4]) as writer:
        for size in (7, 3, 0):
            writer.add(range(size))
    file = read(tmp_path / "x")
    assert file.documents.tolist() == [0, 7, 10, 10]
    assert struct.unpack_from("<QQ", file.index.read_bytes(), 18) == (5, 4)  # 3 + 3 + 1, 3, 0


def test_modes_of_a_multimodal_file_are_passed_over(tmp_path: Path) -> None:
    assert read(lay(tmp_path, IDX + b"\0\1\0")).documents.tolist() == [0, 4, 5]


def test_an_error_leaves_nothing_and_an_id_that_does_not_fit_is_one(tmp_path: Path) -> None:
    with pytest.raises(OverflowError, match="65536 do not fit uint16"), Writer(tmp_path / "x", DTYPES[8]) as writer:
        writer.add([1, 65536])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("idx", "told"),
    [
        (b"", "is cut off: 0 bytes"),
        (b"MMIDIDX\x00\x01" + IDX[9:], "it starts with b'MMIDIDX"),
        (b"TNTIDX\x00\x00" + IDX[8:], "is no index of a token file"),
        (patched(9, "<Q", 2), "has version 2; only version 1"),
        (patched(17, "<B", 7), "has dtype code 7"),
        (patched(17, "<B", 0), "has dtype code 0"),
        (patched(17, "<B", 4), "sequence 1 starts at byte 6, but the sequences before it end at byte 12"),
        (patched(18, "<Q", 4), "header counts 4 sequences"),
        (patched(18, "<Q", 2**63), "header counts 9223372036854775808 sequences"),
        (patched(26, "<Q", 2**64 - 1), "18446744073709551615 document entries"),
        (patched(LENGTHS + 4, "<i", -1), "sequence 1 has length -1"),
        (patched(LENGTHS + 8, "<i", 2), "describes 6 ids of 2 bytes, but"),
        (patched(POINTERS + 16, "<q", 1 << 40), "sequence 2 starts at byte 1099511627776"),
        (patched(POINTERS, "<q", -2), "sequence 0 starts at byte -2"),
        (patched(DOCUMENTS, "<q", 1), "runs from 1 to 3"),
        (patched(DOCUMENTS + 16, "<q", 4), "runs from 0 to 4; it must run from 0 to the 3 sequences"),
        (patched(DOCUMENTS + 8, "<q", -1), "decreases, from 0 to -1 at entry 1"),
        (patched(DOCUMENTS + 8, "<q", 9), "decreases, from 9 to 3 at entry 2"),
        (struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 0, 0), "runs without an entry"),
    ],
)
def test_a_wrong_index_names_file_and_field_in_one_line(tmp_path: Path, idx: bytes, told: str) -> None:
    with pytest.raises(CorpusError) as caught:
        read(lay(tmp_path, idx))
    assert told in str(caught.value)
    assert "wiki.en.idx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [*(BIN[:cut] for cut in range(len(BIN))), BIN + b"\0", BIN + b"\0\0"])
def test_data_of_another_size_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorpusError, match=f"has {len(data)} bytes: they do not belong together"):
        read(lay(tmp_path, data=data))


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_half_a_token_file_is_refused(tmp_path: Path, missing: str) -> None:
    prefix = lay(tmp_path)
    Path(f"{prefix}{missing}").unlink()
    with pytest.raises(CorpusError, match=rf"wiki\.en\{missing} does not exist"):
        read(prefix)


def test_an_index_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    prefix = lay(tmp_path)
    Path(f"{prefix}.idx").unlink()
    Path(f"{prefix}.idx").mkdir()
    with pytest.raises(CorpusError, match=r"wiki\.en\.idx (cannot be read|is cut off)"):
        read(prefix)


def test_a_file_without_an_id_is_empty(tmp_path: Path) -> None:
    with Writer(tmp_path / "x", DTYPES[1]) as writer:
        writer.add([])
    with pytest.raises(CorpusError, match=r"x\.bin is empty"):
        read(tmp_path / "x")


@settings(deadline=None)
@given(cut=st.integers(0, len(IDX) - 1))
def test_an_index_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.raises(CorpusError, match="cut off"):
        read(lay(tmp_path_factory.mktemp("cut"), IDX[:cut]))


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, len(IDX) - 1), flip=st.integers(1, 255))
def test_a_byte_changed_anywhere_is_refused_or_only_moves_a_document(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    """Only the inner entry of the document index has another value that is possible: 0, 1 or 3 for 2."""
    changed = bytearray(IDX)
    changed[at] ^= flip
    prefix = lay(tmp_path_factory.mktemp("flip"), bytes(changed))
    try:
        documents = read(prefix).documents.tolist()
    except CorpusError:
        return
    assert at == DOCUMENTS + 8
    assert documents in ([0, 0, 5], [0, 3, 5], [0, 5, 5])


@given(noise=st.binary(min_size=0, max_size=200))
def test_rubbish_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    with pytest.raises(CorpusError):
        read(lay(tmp_path_factory.mktemp("noise"), noise))


def test_paths_keep_a_dot_in_the_prefix() -> None:
    assert paths(Path("a/wiki.en")) == (Path("a/wiki.en.bin"), Path("a/wiki.en.idx"))
