"""Truncation sampling and long context for Hugging Face transformers, from the command line."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer import Option
from typer.core import TyperGroup

from hf_longtrunc import __version__
from hf_longtrunc.cli.ask import ask
from hf_longtrunc.cli.chat import chat
from hf_longtrunc.cli.check_packed import check_packed
from hf_longtrunc.cli.demo import demo
from hf_longtrunc.cli.export import export, serve, verify
from hf_longtrunc.cli.lm_eval import lm_eval
from hf_longtrunc.cli.match import match
from hf_longtrunc.cli.pack import pack
from hf_longtrunc.cli.ppl import ppl
from hf_longtrunc.cli.scrolls import scrolls
from hf_longtrunc.cli.summarize import summarize

NAME = "hf-longtrunc"
MISTAKES = (ImportError, OSError, OverflowError, TypeError, ValueError)  # what a user's mistake raises


class Commands(TyperGroup):
    """Subcommands that report an error as one line on stderr, with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**kwargs, "prog_name": NAME, "standalone_mode": False})
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's exit
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            _say(context.command_path if context else NAME, error.format_message())
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand that `ctx` names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has left, as `| head` does: typer ends quietly
            raise
        except MISTAKES as error:
            if ctx.params["traceback"]:
                raise
            said = "a number is too large: " * isinstance(error, OverflowError) + (str(error) or repr(error))
            _say(f"{ctx.command_path} {ctx.invoked_subcommand or ''}".strip(), said)
            raise typer.Exit(2) from error


def _say(command: str, message: str) -> None:
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)


app = typer.Typer(cls=Commands, invoke_without_command=True, rich_markup_mode="rich")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def main(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Show the help where no subcommand is named."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are files, whether or not there is a screen
    if context.invoked_subcommand is None:
        print(context.get_help())


EXAMPLES: dict[Any, str] = {  # command -> what follows it in the example at the end of its --help
    demo: "sampling packing --output-dir pictures",
    ask: 'a_novel.txt "Who stole the bishop\'s peacock?"',
    chat: "--model Qwen/Qwen3-0.6B --window 4096",
    ppl: "a_novel.txt --window 4096 --output-dir perplexity",
    scrolls: "qasper --limit 20 --lm-infinite --window 4096",
    lm_eval: "niah_single_1 --lengths 4096,8192 --limit 10 --lm-infinite --window 4096",
    export: "Qwen/Qwen3-0.6B endless --window 4096 --sampler eta=0.002",
    verify: "endless",
    serve: "endless --port 8000",
    summarize: "a_novel.txt --model facebook/bart-large-cnn",
    pack: "corpus.jsonl --tokenizer gpt2 --seq-length 2048 --output-dir packed",
    check_packed: "Qwen/Qwen3-0.6B --rows packed",
    match: "a_novel.txt --max-tokens 512 --picture match.png",
}
for function, example in EXAMPLES.items():
    command = function.__name__.replace("_", "-")
    app.command(command, epilog=escape(f"Example: {NAME} {command} {example}"))(function)
