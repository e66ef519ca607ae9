"""The index is Megatron's, and a damaged one is never believed."""

import json
import random
import zlib

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_glm.data import indexed
from megatron_glm.data.indexed import (
    IndexedDatasetError,
    check_indexed_dataset,
    token_dtype,
    write_index,
)

NUM_FUZZED = 3000


def write_dataset(prefix, documents, dtype=np.uint16, checksums=False):
    """Documents, each a list of the lengths of its sequences, written by Megatron."""
    rng = np.random.RandomState(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for lengths in documents:
        builder.add_document(rng.randint(0, 9999, sum(lengths)).astype(dtype), lengths)
    builder.finalize(f"{prefix}.idx")
    if checksums:
        data, idx = (prefix.with_suffix(f".{kind}").read_bytes() for kind in ("bin", "idx"))
        ends = data[: indexed.END_BYTES] + data[-indexed.END_BYTES :]
        sums = {"bin_crc32": data, "bin_ends_crc32": ends, "idx_crc32": idx}
        sums = {name: zlib.crc32(part) for name, part in sums.items()}
        prefix.with_suffix(".checksums.json").write_text(json.dumps(sums))


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "data"


def test_codes_and_types_are_those_of_megatron():
    for code, dtype in indexed.DTYPE_CODES.items():
        assert DType.dtype_from_code(code) is dtype
    for vocab_size in (2, 65499, 65500, 65536, 150528):
        assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_index_is_byte_for_byte_that_of_megatron(prefix, monkeypatch, chunk, dtype):
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    documents = [[5], [1, 2, 3], [4, 4], [7], [1]]
    write_dataset(prefix, documents, dtype)
    lengths, bounds = prefix.with_suffix(".lengths"), prefix.with_suffix(".bounds")
    np.array([n for parts in documents for n in parts], dtype=np.int32).tofile(lengths)
    np.array([len(parts) for parts in documents], dtype=np.int32).tofile(bounds)
    crc = write_index(prefix.with_suffix(".ours"), dtype, lengths, bounds)
    expected = prefix.with_suffix(".idx").read_bytes()
    assert prefix.with_suffix(".ours").read_bytes() == expected
    assert crc == zlib.crc32(expected)
    check_indexed_dataset(prefix)


def test_offsets_past_2_to_the_32(prefix):
    # 3 * 2^31 bytes of ids, none of which are written: the .bin is a hole.
    lengths = np.full(3072, 1 << 20, dtype=np.int32)
    lengths[-1] = 5
    lengths.tofile(prefix.with_suffix(".lengths"))
    np.ones(3072, dtype=np.int32).tofile(prefix.with_suffix(".bounds"))
    write_index(prefix.with_suffix(".idx"), np.uint16, prefix.with_suffix(".lengths"),
                prefix.with_suffix(".bounds"))
    num_bytes = 2 * int(lengths.sum(dtype=np.int64))
    with prefix.with_suffix(".bin").open("wb") as data:
        data.truncate(num_bytes)
        data.seek(num_bytes - 10)
        data.write(np.arange(5, dtype=np.uint16).tobytes())
    check_indexed_dataset(prefix)
    # Kept in a name: what it returns is memory that it unmaps when it goes.
    dataset = IndexedDataset(str(prefix))
    assert dataset[3071].tolist() == [0, 1, 2, 3, 4]
    with prefix.with_suffix(".bin").open("r+b") as data:
        data.truncate(num_bytes - 1)
    with pytest.raises(IndexedDatasetError, match=r"data\.bin: 6440\d* bytes, and not the"):
        check_indexed_dataset(prefix)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_whole_datasets_pass(prefix, monkeypatch, chunk):
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    write_dataset(prefix, [[5], [1, 2, 3], [4, 4]], checksums=True)
    check_indexed_dataset(prefix)
    check_indexed_dataset(prefix, contents=True)


def damage(rng, data):
    """A copy of some bytes, cut off, with bits flipped, or with parts moved, repeated or zeroed."""
    data = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == 2:
        middle = rng.randrange(a, b + 1)
        return bytes(data[:a] + data[middle:b] + data[a:middle] + data[b:])
    if kind == 3:
        return bytes(data[:b] + data[a:])
    return bytes(data[:a]) + bytes(b - a) + bytes(data[b:])


@pytest.mark.parametrize("checksums", [False, True])
def test_fuzzed_index_is_refused_or_is_the_same_dataset(prefix, checksums):
    documents = [[5], [1, 2, 3], [4, 4], [7], [300, 2], [1]]
    write_dataset(prefix, documents, checksums=checksums)
    idx = prefix.with_suffix(".idx")
    whole = idx.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(NUM_FUZZED):
        fuzzed = damage(rng, whole)
        idx.write_bytes(fuzzed)
        try:
            check_indexed_dataset(prefix)
        except IndexedDatasetError as error:
            assert str(prefix) in str(error)
            refused += 1
            continue
        if checksums:
            assert fuzzed == whole
        else:
            # Without checksums a changed document bound may go unnoticed, and a type of the same
            # size, but every sequence is where it was and nothing is read out of bounds.
            n = sum(map(len, documents))
            assert fuzzed[18 : 34 + 12 * n] == whole[18 : 34 + 12 * n]
            dataset = IndexedDataset(str(prefix))
            assert [len(dataset[i]) for i in range(len(dataset))] == sum(documents, [])
    assert refused > NUM_FUZZED * 0.8


def test_fuzzed_ids_are_found_by_their_checksum(prefix):
    write_dataset(prefix, [[50], [100, 20]], checksums=True)
    data = prefix.with_suffix(".bin")
    whole = data.read_bytes()
    rng = random.Random(1)
    for _ in range(NUM_FUZZED // 3):
        fuzzed = damage(rng, whole)
        data.write_bytes(fuzzed)
        if fuzzed == whole:
            check_indexed_dataset(prefix, contents=True)
        else:
            with pytest.raises(IndexedDatasetError, match=r"data\.bin: "):
                check_indexed_dataset(prefix, contents=True)


@pytest.mark.parametrize("damage", ["other data of the same size", "a hole at the end"])
def test_a_bin_of_the_right_size_is_not_believed_for_that(prefix, monkeypatch, damage):
    monkeypatch.setattr(indexed, "END_BYTES", 100)
    write_dataset(prefix, [[500], [1000, 200]], checksums=True)
    check_indexed_dataset(prefix)
    data = prefix.with_suffix(".bin")
    whole = data.read_bytes()
    data.write_bytes(whole[::-1] if damage.startswith("other") else whole[:-200] + bytes(200))
    with pytest.raises(IndexedDatasetError, match=r"data\.bin: its bin_ends_crc32 is \d+, and not"):
        check_indexed_dataset(prefix)
    # What only a reading of the whole file can find.
    data.write_bytes(whole[:600] + bytes(1) + whole[601:])
    check_indexed_dataset(prefix)
    with pytest.raises(IndexedDatasetError, match=r"data\.bin: its bin_crc32 is \d+, and not"):
        check_indexed_dataset(prefix, contents=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"idx_crc32": "x"}', '{"idx_crc32": null}'])
def test_damaged_checksums_are_named(prefix, content):
    write_dataset(prefix, [[5]])
    prefix.with_suffix(".checksums.json").write_text(content)
    with pytest.raises(IndexedDatasetError, match=r"checksums\.json: cannot be read"):
        check_indexed_dataset(prefix)


def test_missing_files_are_named(prefix):
    with pytest.raises(IndexedDatasetError, match=r"data\.idx: no such file"):
        check_indexed_dataset(prefix)
    write_dataset(prefix, [[5]])
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(IndexedDatasetError, match=r"data\.bin: no such file"):
        check_indexed_dataset(prefix)


def test_pair_of_two_datasets_is_refused(prefix, tmp_path):
    write_dataset(prefix, [[5], [6]])
    write_dataset(tmp_path / "other", [[5], [7]])
    (tmp_path / "other.bin").rename(prefix.with_suffix(".bin"))
    with pytest.raises(IndexedDatasetError, match=r"24 bytes, and not the 22 of its index"):
        check_indexed_dataset(prefix)


def test_empty_dataset_is_refused(prefix):
    write_dataset(prefix, [])
    with pytest.raises(IndexedDatasetError, match="holds no sequences"):
        check_indexed_dataset(prefix)
