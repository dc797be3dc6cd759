"""`hf-longtrunc pack`: files of documents in, a packed dataset, a table and a picture out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_longtrunc.data.dataset import pack
from hf_longtrunc.data.report import packing_table, save_picture

if TYPE_CHECKING:
    import datasets

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


class Long(str, Enum):
    """What becomes of a document longer than a row."""

    SPLIT = "split"
    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class SampleBy(str, Enum):
    """What a document is in a text file."""

    DOCUMENT = "document"
    PARAGRAPH = "paragraph"
    LINE = "line"


def pack_command(
    files: Annotated[
        list[Path], typer.Argument(help="jsonl, json, parquet or txt files.", exists=True, dir_okay=False)
    ],
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder; needed for text, its EOS ends every document.")
    ] = None,
    column: Annotated[str, typer.Option(help="The column of text; not looked at where there are input_ids.")] = "text",
    sample_by: Annotated[SampleBy, typer.Option(help="What a document is in a txt file.")] = SampleBy.DOCUMENT,
    long: Annotated[Long, typer.Option(help="What becomes of a document longer than a row.")] = Long.SPLIT,
    min_piece: Annotated[int, typer.Option(min=1, help="Shorter pieces are left out; 1 keeps every token.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the rows' order.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Where dataset and picture go.")] = Path("packed"),
) -> None:
    """Pack documents into rows without one unnecessary cut; what it did, beside concatenating and slicing them."""
    console = Console()
    try:
        documents, loaded_tokenizer = _tokenized(files, tokenizer, column, sample_by.value)
        packed = pack(documents, seq_length, loaded_tokenizer, long=long.value, min_piece=min_piece, seed=seed)
    except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        console.print(f"[bold red]Could not pack.[/bold red] {error}", highlight=False)
        raise typer.Exit(1) from error
    console.print(packing_table(packed.packing))
    picture = save_picture(packed.packing, output_dir / "packing.png")
    with console.status("writing the rows"):
        packed.materialize().save_to_disk(output_dir / "dataset")
    console.print(f"picture: [bold]{picture}[/bold]\ndataset: [bold]{output_dir / 'dataset'}[/bold]")
    console.print("read it with datasets.load_from_disk, train on it with BestFitPackingCollator", style="dim")


def _tokenized(files: list[Path], tokenizer_name: str | None, column: str, sample_by: str) -> tuple[Any, Any]:
    documents = _read(files, sample_by)
    tokenizer = None
    if tokenizer_name is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if "input_ids" in documents.column_names:
        return documents, tokenizer
    if column not in documents.column_names:
        raise ValueError(f"the files have no column {column!r}, only {documents.column_names}; name it with --column")
    if tokenizer is None:
        raise ValueError(f"column {column!r} is text: name a tokenizer with --tokenizer")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # A document longer than the model's window is wanted whole: it is cut into rows afterwards.
        return {"input_ids": tokenizer(batch[column], verbose=False)["input_ids"]}

    return documents.map(tokenize, batched=True, remove_columns=documents.column_names, desc="tokenizing"), tokenizer


def _read(files: list[Path], sample_by: str) -> datasets.Dataset:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading files needs datasets: pip install 'hf_longtrunc[train]'") from error
    suffixes = {file.suffix for file in files}
    readers = {_READERS.get(suffix) for suffix in suffixes}
    if len(readers) != 1 or None in readers:
        raise ValueError(f"files must be of one kind out of {', '.join(_READERS)}, got {', '.join(sorted(suffixes))}")
    reader = str(readers.pop())
    options = {"sample_by": sample_by} if reader == "text" else {}
    loaded: datasets.Dataset = datasets.load_dataset(
        reader, data_files=[str(file) for file in files], split="train", **options
    )
    return loaded
