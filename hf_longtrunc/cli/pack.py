"""`hf-longtrunc pack`: files of documents in, a packed dataset, a table and a picture out."""

from __future__ import annotations

import json
from enum import Enum
from glob import glob
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.markup import escape
from typer import Argument, Option

from hf_longtrunc.cli import common
from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    import datasets

_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


class Column(str, Enum):
    """Columns that are written in addition to the boundaries."""

    INPUT_IDS = "input_ids"
    LABELS = "labels"


def pack(
    files: Annotated[list[str], Argument(help="jsonl, json, parquet, txt, also compressed; or patterns.")],
    seq_length: Annotated[int, Option(min=1, help="Tokens in a row.")] = 2048,
    tokenizer: Annotated[str | None, Option(help="Hub id or folder; needed for text.")] = None,
    column: Annotated[str, Option(help="The column of text; not looked at where there are input_ids.")] = "text",
    sample_by: Annotated[
        Literal["document", "paragraph", "line"], Option(help="What one document of a txt is.")
    ] = "document",
    long: Annotated[
        Literal["split", "truncate", "drop", "error"], Option(help="What is done with a document longer than a row.")
    ] = "split",
    min_piece: Annotated[int, Option(min=1, help="Shorter pieces are left out; 1 keeps every token.")] = 2,
    seed: Annotated[int, Option(help="Random seed of the rows' order.")] = 0,
    num_proc: Annotated[int, Option(min=1, help="Processes that tokenize and write.")] = 1,
    dtype: Annotated[Literal["int64", "int32"], Option(help="Type of the written columns.")] = "int64",
    columns: Annotated[
        list[Column],
        Option(help="Columns in addition to the boundaries; labels are needed where there are masks."),
    ] = [Column.INPUT_IDS, Column.LABELS],  # noqa: B006
    output_dir: Annotated[Path, Option(help="Where dataset and picture go.")] = Path("packed"),
    force: common.Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Pack documents into rows without one unnecessary cut, and compare with concatenating and slicing them."""
    files = [name for file in files for name in _matching(file)]
    common.check_outputs(output_dir, "packing.png", "dataset", force=force)
    from hf_longtrunc import pack, packing_table, plot_packing

    documents, loaded_tokenizer = _tokenized([Path(file) for file in files], tokenizer, column, sample_by, num_proc)
    packed = pack(documents, seq_length, loaded_tokenizer, long=long, min_piece=min_piece, seed=seed)
    packed.materialize(output_dir / "dataset", num_proc=num_proc, dtype=dtype, columns=[each.value for each in columns])
    if as_json:
        common.print_json(packed.packing.stats())
    else:
        common.results().print(packing_table(packed.packing))
    common.save_picture(plot_packing(packed.packing)[0], output_dir / "packing.png")
    common.notes().print(f"dataset: [bold]{escape(str(output_dir / 'dataset'))}[/bold]")
    common.notes().print("read it with datasets.load_from_disk, train on it with BestFitPackingCollator", style="dim")


def _matching(pattern: str) -> list[str]:
    """Return the file of that name, or those that a quoted pattern such as "*.parquet" names."""
    names = sorted(glob(pattern, recursive=True)) if not Path(pattern).exists() else []
    for name in names or [pattern]:
        common.check_file(name)
    return names or [pattern]


def _kind(file: Path) -> str:
    """Return the suffix of a file, that of its compression left out."""
    return file.with_suffix("").suffix if file.suffix in _COMPRESSED else file.suffix


def _tokenized(
    files: list[Path], tokenizer_name: str | None, column: str, sample_by: str, num_proc: int
) -> tuple[Any, Any]:
    """Return the documents with their input_ids, and the tokenizer."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing("reading files", error.name, "train") from error
    if not common.is_watched():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # what it logs as an error is raised too
    tokenizer: Any = None if tokenizer_name is None else common.load_tokenizer(tokenizer_name)
    try:
        documents = _read(files, sample_by)
        if "input_ids" in documents.column_names:
            return documents, tokenizer
        if column not in documents.column_names:
            raise ValueError(
                f"the files have no column {column!r}, only {documents.column_names}; name it with --column"
            )
        if tokenizer is None:
            raise ValueError(f"column {column!r} is text: name a tokenizer with --tokenizer")

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            if not all(isinstance(text, str) for text in batch[column]):
                raise TypeError(f"column {column!r} must hold text")
            # A document longer than the model's window is wanted whole: it is cut into rows afterwards.
            return {"input_ids": tokenizer(batch[column], verbose=False)["input_ids"]}

        names = documents.column_names
        processes = num_proc if num_proc > 1 else None
        options: dict[str, Any] = {"batched": True, "remove_columns": names, "num_proc": processes}
        return documents.map(tokenize, **options, desc="tokenizing"), tokenizer
    except (datasets.exceptions.DatasetsError, TypeError, UnicodeDecodeError) as error:
        for file in files:
            _check_content(file, column)
        raise ValueError(f"{', '.join(map(str, files))} cannot be read: {error.__cause__ or error}") from error


def _read(files: list[Path], sample_by: str) -> datasets.Dataset:
    import datasets

    suffixes = {_kind(file) for file in files}
    readers = {_READERS.get(suffix) for suffix in suffixes}
    if len(readers) != 1 or None in readers:
        raise ValueError(f"files must be of one kind out of {', '.join(_READERS)}, got {', '.join(sorted(suffixes))}")
    if empty := [str(file) for file in files if not file.stat().st_size]:
        raise ValueError(f"{', '.join(empty)} is empty")
    reader = str(readers.pop())
    options = {"sample_by": sample_by} if reader == "text" else {}
    names = [str(file) for file in files]
    loaded: datasets.Dataset = datasets.load_dataset(reader, data_files=names, split="train", **options)
    return loaded


def _check_content(file: Path, column: str) -> None:
    """Name the file that is no UTF-8 text, or the line that is no JSON object with a text in `column`."""
    if file.suffix == ".parquet" or file.suffix in _COMPRESSED:
        return
    with common.open_text(str(file)) as lines:
        for number, line in enumerate(lines, 1):
            if file.suffix == ".jsonl" and line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    got = repr(line[:60].rstrip())
                    raise ValueError(
                        f"{file}, line {number}: expected a JSON object with text in {column!r}, got {got}"
                    )
