"""tools/verify_data.py finds a damaged byte anywhere, and goes on with the other datasets."""

import pytest

from tests.data.test_indexed import write_dataset
from tools import verify_data


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        verify_data.main([str(argument) for argument in arguments])
    return status.value.code, capsys.readouterr().out.splitlines()


@pytest.fixture
def datasets(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name, [[500], [1000, 200]], checksums=True)
    return tmp_path / "a", tmp_path / "b"


def test_whole_datasets_by_prefix_and_by_file(capsys, datasets):
    first, second = datasets
    assert run(capsys, first, f"{second}.bin") == (0, [f"whole: {first}", f"whole: {second}"])


def test_a_damaged_byte_is_found_and_the_others_are_compared_all_the_same(capsys, datasets):
    data = datasets[0].with_suffix(".bin")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    status, lines = run(capsys, *datasets)
    assert status == 1
    assert lines[0].startswith(f"NOT whole: {data}: its bin_") and lines[1].startswith("whole: ")


def test_a_dataset_without_checksums_is_not_called_whole(capsys, datasets):
    datasets[0].with_suffix(".checksums.json").unlink()
    status, (line,) = run(capsys, datasets[0])
    assert status == 1 and "no such file; only the sizes" in line
