"""Rows of parquet files, streamed; needs the optional pyarrow."""

from collections.abc import Iterator, Sequence

from megatron_glm.errors import GLMError


def read_row_batches(
    path: str, keys: Sequence[str], start: int, batch_bytes: int
) -> Iterator[tuple[int, list[tuple], float]]:
    """(rows before it, rows, share of the file that is read behind it) of each batch from row
    `start` on.

    A row has the value of each key: bytes where the column is text, since a file may hold text that
    is not UTF-8. A batch takes about `batch_bytes` uncompressed. GLMError where pyarrow or a column
    is missing; OSError where the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise GLMError(f"--input {path}: reading parquet needs `pip install pyarrow`") from error
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as parquet:
            missing = set(keys) - set(parquet.schema_arrow.names)
            if missing:
                raise GLMError(
                    f"--json-keys {' '.join(sorted(missing))}: no such column in {path}, which has "
                    f"{', '.join(parquet.schema_arrow.names)}"
                )
            yield from _read_groups(parquet, keys, start, batch_bytes)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _read_groups(parquet, keys, start, batch_bytes):
    total = parquet.metadata.num_rows
    line = 0
    for group in range(parquet.num_row_groups):
        meta = parquet.metadata.row_group(group)
        if line + meta.num_rows <= start:
            line += meta.num_rows
            continue
        rows_at_once = max(1, batch_bytes * meta.num_rows // max(1, meta.total_byte_size))
        for batch in parquet.iter_batches(rows_at_once, row_groups=[group], columns=list(keys)):
            skip = min(batch.num_rows, max(0, start - line))
            rows = list(zip(*(_values(batch.column(key)[skip:]) for key in keys), strict=True))
            line += batch.num_rows
            if rows:
                yield line - len(rows), rows, line / total
    if line != total:
        raise OSError(f"it holds {line} rows, and not the {total} that it tells")


def _values(column) -> list:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
