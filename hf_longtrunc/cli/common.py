"""What several subcommands share: options, loading, reading texts, checking outputs, printing.

Results go to stdout, everything else to stderr. A mistake is a `typer.BadParameter`, or an error of this package that
`app.py` turns into one line; both exit with 2.
"""

from __future__ import annotations

import json
import math
import os
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_longtrunc.evaluation.records import Arm

Model = Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")]
DType = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="The weights' type; bfloat16 on CUDA and float32 elsewhere if left out."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; CUDA if there is one, if left out.")]
Window = Annotated[
    int | None, typer.Option(min=1, max=2**31 - 1, help="LM-Infinite's window; the trained one if left out.")
]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens that stay visible.")]
WithLMInfinite = Annotated[bool, typer.Option("--lm-infinite", help="Run LM-Infinite too, side by side.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]

_CONVERT = "convert it, e.g. with iconv -f {} -t utf-8"
_PIPED = 10_000  # columns: output to a program is not wrapped


def results(*, is_quiet: bool = False) -> Console:
    """Return the console of results: stdout, as wide as the terminal, without line breaks of its own in a pipe."""
    return Console(width=_width(sys.stdout), highlight=False, quiet=is_quiet)


def notes() -> Console:
    """Return the console of progress, paths and remarks: stderr."""
    return Console(stderr=True, width=_width(sys.stderr), highlight=False)


def is_watched() -> bool:
    """Whether stderr is a terminal: a log gets no progress bars."""
    return sys.stderr.isatty()


def print_json(value: object) -> None:
    """Print a value as one line of JSON on stdout; NaN and infinity, which JSON has no word for, become null."""
    print(json.dumps(_plain(value)))


def load(
    name: str | None,
    dtype: str | None = None,
    device: str | None = None,
    *,
    needs: Literal["a causal LM", "an encoder-decoder"] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that --model names, None the default; the wrong kind is refused before its weights.

    Raises:
        typer.BadParameter: a device that is not there, or a model that cannot be loaded.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    from hf_longtrunc import load_pretrained
    from hf_longtrunc.pretrained import checked_device, checked_name, default_model_folder

    if not is_watched():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        checked_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("device "), param_hint="--device") from error
    try:
        config: Any = None if name is None else AutoConfig.from_pretrained(checked_name(name))
        if config is not None and needs is not None and config.is_encoder_decoder != (needs == "an encoder-decoder"):
            kind = "an encoder-decoder" if config.is_encoder_decoder else "a causal LM"
            raise TypeError(f"this command needs {needs}, and this is {kind}")
        source = default_model_folder() if name is None else name  # fetched under pip's own progress bar
        return load_pretrained(source, dtype=dtype, device=device)  # under transformers' own progress bar
    except Exception as error:  # from_pretrained raises what its files make it raise
        raise _could_not_load(name or "the default model", error, "--model") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that --tokenizer names; errors as for `load`."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise _could_not_load(name, error, "--tokenizer") from error
    return tokenizer


def _could_not_load(name: str, error: Exception, option: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"could not load {name}: {error}; {option} takes a hub id or a folder for transformers' from_pretrained",
        param_hint=option,
    )


def arms(lm_infinite: bool, window: int | None, sinks: int) -> dict[str, Arm]:
    """Return the arms that a command compares: the unmodified model and each patch that was asked for."""
    from contextlib import nullcontext

    from hf_longtrunc import LMInfinite

    chosen: dict[str, Arm] = {"unmodified": nullcontext}
    if lm_infinite:
        chosen["lm-infinite"] = LMInfinite(num_sink_tokens=sinks, window_length=window)
    return chosen


def read_text(path: str, option: str = "FILE") -> str:
    """Return a UTF-8 text whole; - is standard input."""
    with open_text(path, option) as stream:
        return stream.read()


def check_file(path: str, option: str = "FILE") -> None:
    """Refuse a path that names no file that can be read; - is standard input."""
    if path == "-":
        return
    if not Path(path).exists():
        raise typer.BadParameter(f"no such file: {path}", param_hint=option)
    if Path(path).is_dir():
        raise typer.BadParameter(f"{path} is a folder, expected a text file", param_hint=option)
    if not os.access(path, os.R_OK):
        raise typer.BadParameter(f"{path} cannot be read: permission denied", param_hint=option)


@contextmanager
def open_text(path: str, option: str = "FILE") -> Iterator[TextIO]:
    """Open a UTF-8 text, or standard input for -, and name it where its bytes are no UTF-8."""
    check_file(path, option)
    try:
        if path == "-":
            if hasattr(sys.stdin, "reconfigure"):
                sys.stdin.reconfigure(encoding="utf-8", errors="strict")
            yield sys.stdin
        else:
            with open(path, encoding="utf-8") as stream:
                if stream.seekable():  # no <(a command)
                    if "\0" in stream.read(1000):
                        raise typer.BadParameter(
                            f"{path} holds NUL characters, as UTF-16 does; {_CONVERT.format('utf-16')}",
                            param_hint=option,
                        )
                    stream.seek(0)
                yield stream
    except UnicodeDecodeError as error:
        source = "standard input" if path == "-" else path
        begins = error.object[:4] if not error.start else b""
        marks = {BOM_UTF32_LE: "utf-32", BOM_UTF32_BE: "utf-32", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
        encoding = next((name for mark, name in marks.items() if begins.startswith(mark)), "")
        if b"\0" in error.object and not encoding:
            raise typer.BadParameter(f"{source} is no text but a binary file", param_hint=option) from error
        found = f"it is {encoding.upper()}" if encoding else f"{error.reason} at byte {error.start}"
        raise typer.BadParameter(
            f"{source} is no UTF-8 text ({found}); {_CONVERT.format(encoding or 'latin1')}", param_hint=option
        ) from error


def check_outputs(folder: Path, *names: str, force: bool, option: str = "--output-dir") -> None:
    """Refuse, before any work is done, a folder that cannot be written or files in it that would be overwritten."""
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is a file, expected a folder", param_hint=option)
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{nearest} cannot be written to: {error.strerror}", param_hint=option) from error
    there = [str(folder / name) for name in names if (folder / name).exists()]
    if there and not force:
        raise typer.BadParameter(
            f"{', '.join(there)} would be overwritten: name another {option}, or pass --force", param_hint=option
        )
    for name in names:
        if force and (folder / name).is_dir() and Path(name).suffix:
            raise typer.BadParameter(f"{folder / name} is a folder, expected a file", param_hint=option)


def save_picture(drawn: Any, path: Path) -> None:
    """Write a figure, or the figure of an axes, close it and say where it lies."""
    import matplotlib.pyplot as plt

    from hf_longtrunc.saving import replacing

    figure = drawn.figure
    with replacing(path) as written:
        figure.savefig(written, dpi=130)
    plt.close(figure)
    notes().print(f"picture: [bold]{escape(str(path))}[/bold]")


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else _PIPED


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
