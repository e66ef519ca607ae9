"""From files of text to indexed datasets: complete, in order, and nothing bad in silence."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_glm.data.codecs import build_codec
from tests.tools.faults import (
    use_small_documents,
)
from tests.tools.preprocessing import (
    assert_only_final_files,
    documents_of,
    interrupt,
    output_files,
    read_documents,
    write_inputs,
    write_jsonl,
)

# -- what is written


@pytest.mark.parametrize("eod", [False, True])
def test_output_is_byte_for_byte_what_megatron_would_write(tool, tmp_path, codec, texts, eod):
    result = tool("--input", write_jsonl(tmp_path / "a.jsonl", texts),
                  *(["--append-eod"] if eod else []))
    assert result.code == 0, result.output
    end = [codec.specials["<eod>"]] if eod else []
    builder = IndexedDatasetBuilder(str(tmp_path / "expected.bin"), dtype=np.uint16)
    for text in texts:
        ids = np.array(codec.encode(text) + end, dtype=np.uint16)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "expected.idx"))
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"expected{suffix}").read_bytes()
        assert (tmp_path / f"out_text_document{suffix}").read_bytes() == expected
    assert_only_final_files(tmp_path)
    assert f"{len(texts)} documents" in result.output
    assert "B/s" in result.output and "tokens" in result.output


def test_all_formats_of_a_folder_in_the_order_of_their_names(tool, tmp_path, codec, texts):
    write_inputs(tmp_path / "in", texts)
    result = tool("--input", tmp_path / "in")
    assert result.code == 0, result.output
    expected = documents_of(codec, texts)
    assert read_documents(tmp_path / "out_text_document", codec) == expected


def test_output_does_not_depend_on_workers_or_blocks(tool, tmp_path, texts):
    write_inputs(tmp_path / "in", texts)
    assert tool("--input", tmp_path / "in").code == 0
    first = output_files(tmp_path)
    result = tool("--input", tmp_path / "in", "--workers", 1, "--overwrite", setup=None)
    assert result.code == 0, result.output
    assert output_files(tmp_path) == first


def test_a_folder_may_hold_the_output_too(tool, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text("{broken\n" + path.read_text())
    argv = ["--input", tmp_path, "--max-rejects", 1]
    interrupt(tool, tmp_path, argv)
    assert tool(*argv).code == 0
    assert (tmp_path / "out.rejects.jsonl").exists()
    assert "already complete" in tool(*argv).output


def test_files_and_globs_come_in_the_order_given(tool, tmp_path, codec, texts):
    for name, part in [("b", texts[:5]), ("c1", texts[5:10]), ("a", texts[10:15])]:
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    inputs = [tmp_path / "b.jsonl", tmp_path / "c*.jsonl", tmp_path / "a.jsonl"]
    assert tool("--input", *inputs).code == 0
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, texts[:15])


def test_paragraphs_of_plain_text(tool, tmp_path, codec):
    paragraphs = [f"paragraph {i}\nsecond line " + "x" * (i % 50) * 20 for i in range(200)]
    text = "\n \n" + "".join(p + "\n" * (2 + i % 3) for i, p in enumerate(paragraphs))
    (tmp_path / "a.txt").write_text(text + "\r\n\r\n  last\r\n")
    result = tool("--input", tmp_path / "a.txt", "--text-documents", "blank-line")
    assert result.code == 0, result.output
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, [p.rstrip() for p in paragraphs] + ["  last"])


def test_split_sentences(tool, tmp_path, codec):
    texts = ['It cost 3.50. "Really?" he said. Yes!', "今天很好。我们走吧！好", "one"]
    sentences = [["It cost 3.50.", ' "Really?"', " he said.", " Yes!"],
                 ["今天很好。", "我们走吧！", "好"], ["one"]]
    result = tool("--input", write_jsonl(tmp_path / "a.jsonl", texts), "--split-sentences",
                  "--append-eod")
    assert result.code == 0, result.output
    expected = [[codec.encode(s) for s in parts] for parts in sentences]
    for parts in expected:
        parts[-1].append(codec.specials["<eod>"])
    assert read_documents(tmp_path / "out_text_sentence", codec) == expected


def test_prompts_and_targets_stay_aligned_when_one_is_bad(tool, tmp_path, codec):
    records = [{"inputs": f"question {i}", "targets": f"answer {i}"} for i in range(300)]
    records[7] = {"inputs": "no answer", "targets": ""}
    records[9] = {"inputs": "no targets"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = tool("--input", path, "--json-keys", "inputs", "targets", "--max-rejects", 2)
    assert result.code == 0, result.output
    kept = [r for r in records if r.get("targets")]
    for key in ("inputs", "targets"):
        found = read_documents(tmp_path / f"out_{key}_document", codec)
        assert found == documents_of(codec, [record[key] for record in kept])


def test_large_vocabulary_is_stored_in_32_bits(tmp_path, model, tool):
    tokenizer = json.loads(model.read_text())
    tokenizer["model"]["vocab"] |= {f"filler{i}": 600 + i for i in range(70000)}
    tokenizer["added_tokens"] = []
    big = tmp_path / "big.json"
    big.write_text(json.dumps(tokenizer))
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    result = tool("--input", path, "--tokenizer-model", big, "--append-eod")
    assert result.code == 0, result.output
    codec = build_codec("HuggingFaceTokenizer", big)
    expected = documents_of(codec, ["one", "two"], end=[codec.specials["<eod>"]])
    assert read_documents(tmp_path / "out_text_document", codec) == expected
    assert IndexedDataset(str(tmp_path / "out_text_document")).index.dtype is np.int32


# -- what is bad


def test_rejects_are_listed_with_file_and_line(tool, tmp_path, codec):
    lines = [b'{"text": "good"}', b"", b"{broken", b'{"text": "\xff"}', b'["text"]', b'{"a": 1}',
             b'{"text": 5}', b'{"text": ""}', b'{"text": "\\ud800"}', b"   ", b'{"text": "last"}']
    lines = [b'{"text": "filler %d"}' % i for i in range(300)] + lines
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    result = tool("--input", path, "--max-rejects", 7)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    assert [reject["line"] for reject in rejects] == [303, 304, 305, 306, 307, 308, 309]
    assert {reject["file"] for reject in rejects} == {str(path)}
    reasons = ["not JSON", "not JSON", "JSON list", "no key 'text'", "holds a int", "is empty",
               "not JSON"]
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject["reason"]
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 302


def test_rejects_of_other_formats(tool, tmp_path, codec):
    table = pyarrow.table({"text": pyarrow.array([b"ok", b"\xff\xfe", None, b""] * 60).cast(
        pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "b.txt").write_bytes(b"bad \xc3")
    (tmp_path / "c.txt").write_bytes(b"")
    inputs = [tmp_path / "a.parquet", tmp_path / "b.txt", tmp_path / "c.txt"]
    result = tool("--input", *inputs, "--max-rejects", 182)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    rows = [r for r in range(1, 241) if r % 4 != 1]
    assert [r["line"] for r in rejects] == [*rows, 1, 1]
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 60


def test_too_many_rejects_stop_the_run_and_a_larger_number_goes_on(tool, tmp_path, codec):
    lines = ['{"text": "good"}' * (1 + i % 10 // 9) for i in range(400)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    for _ in range(2):
        result = tool("--input", path, "--max-rejects", 3)
        assert result.code == 2
        assert "--max-rejects 3: " in result.output
        assert f"{path} line " in result.output
        assert not list(tmp_path.glob("out*.bin"))
    assert tool("--input", path, "--max-rejects", 40).code == 0
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 360


def test_a_document_longer_than_memory_should_hold_is_rejected(tool, tmp_path, codec):
    path = write_jsonl(tmp_path / "a.jsonl", ["first", "x" * 20000, "third", "y" * 9000, "fifth"])
    (tmp_path / "b.txt").write_text("b" * 20000)
    (tmp_path / "c.txt").write_text("short\n\n" + "c\n" * 20000 + "\nend")
    result = tool("--input", path, tmp_path / "b.txt", "--max-rejects", 2,
                  setup=use_small_documents)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    assert [(Path(r["file"]).name, r["line"]) for r in rejects] == [("a.jsonl", 2), ("b.txt", 1)]
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, ["first", "third", "y" * 9000, "fifth"])
    result = tool("--input", tmp_path / "c.txt", "--max-rejects", 1, "--overwrite",
                  "--text-documents", "blank-line", setup=use_small_documents)
    assert result.code == 0, result.output
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, ["short", "end"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "missing.jsonl"], "--input missing.jsonl: no such file"),
        (["--input", "a.csv"], "the suffix '.csv' tells no format"),
        (["--input", "a.jsonl", "a.jsonl"], "given twice"),
        (["--input", "a.jsonl", "--json-keys", "a/b"], "--json-keys a/b"),
        (["--input", "a.txt", "--json-keys", "a", "b"], "plain text has but one"),
        (["--input", "a.jsonl", "--workers", "0"], "--workers 0: at least 1"),
        (["--input", "a.parquet"], "cannot be read to its end"),
        (["--input", "b.parquet"], "--json-keys text: no such column"),
        (["--input", "a.txt"], "holds no documents"),
        (["--input", "a.jsonl", "--output-prefix", "/proc/no/a"], "'/proc/no'); give another"),
        (["--input", "a.jsonl", "--text-scheme", "collapsed"], "--text-scheme collapsed with"),
    ],
)
def test_errors_name_the_flag(tool, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_text("PAR1 is not parquet")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    argv = [tmp_path / a if (tmp_path / a).exists() else a for a in argv]
    result = tool(*argv, "--max-rejects", 1)
    assert result.code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out*.idx"))
