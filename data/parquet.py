"""Rows of a .parquet file, by pyarrow, which only data in this form needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARQUET = ".parquet"
_ROWS = 64  # decoded at once: with their pictures they may be large


def read_parquet(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row with its share of the file's bytes; raise EOFError where the file is damaged.

    Raises ValueError without pyarrow.
    """
    check_pyarrow()
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            size = file.stat().st_size // max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=_ROWS):
                for row in _rows(batch):
                    yield row, size
    except (pyarrow.ArrowException, OSError) as error:
        raise EOFError(f"no whole Parquet file: {error}") from None


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch; a cell that Python cannot hold, such as text that is no UTF-8, is b""."""
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError):  # nanoseconds and years after 9999 have no datetime
        columns = [[_cell(cell) for cell in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, ArithmeticError):
        return b""


def check_pyarrow() -> None:
    """Raise ValueError, which names the remedy, if pyarrow is missing."""
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise ValueError("inputs in .parquet need pyarrow: `pip install pyarrow`, or convert them to .jsonl")
