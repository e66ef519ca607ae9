"""What the tests of tools/preprocess_data.py share: inputs, a tokenizer, runs of the tool."""

import gzip
import json
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_glm.data.indexed import check_indexed_dataset
from tests.tools.faults import die_at_call

TOOL = "tools.preprocess_data"


def arguments(folder, model, argv):
    defaults = ["--output-prefix", folder / "out", "--tokenizer-type", "HuggingFaceTokenizer",
                "--tokenizer-model", model, "--workers", 2]
    return [*defaults, *argv]


def write_jsonl(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))
    return path


def read_documents(prefix, codec):
    """The ids of every document, read by Megatron."""
    check_indexed_dataset(prefix, contents=True)
    assert json.loads(Path(f"{prefix}.tokenizer.json").read_text()) == codec.fingerprint
    dataset = IndexedDataset(str(prefix))
    return [
        [dataset[i].tolist() for i in range(a, b)]
        for a, b in zip(dataset.document_indices, dataset.document_indices[1:], strict=False)
    ]


def documents_of(codec, texts, end=()):
    return [[codec.encode(text) + list(end)] for text in texts]


def output_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("out*") if path.is_file()}


def assert_only_final_files(folder):
    assert not (folder / "out.partial").exists()


def write_gz(path, data):
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))


def write_zst(path, data):
    frames = (data[:5000], data[5000:])
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in frames))


def write_parquet(path, texts):
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=150)


def write_inputs(folder, texts):
    """The texts in their order, in five formats."""
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", texts[:50])
    for name, write, part in [("1.jsonl.gz", write_gz, texts[50:100]),
                              ("2.jsonl.zst", write_zst, texts[100:150])]:
        write(folder / name, write_jsonl(folder / "plain", part).read_bytes())
    (folder / "plain").unlink()
    write_parquet(folder / "3.parquet", texts[150:350])
    (folder / "4").mkdir()
    for i, text in enumerate(texts[350:]):
        (folder / "4" / f"{i:03}.txt").write_bytes(text.encode())
    (folder / "passed_over.csv").write_text("not,read")


def interrupt(tool, tmp_path, argv):
    """Kills a run in the middle of its blocks."""
    code = tool(*argv, "--checkpoint-seconds", 0, setup=die_at_call, setup_args=(60,)).code
    assert code == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "state.json").exists()
