"""Truncation sampling and long context for Hugging Face transformers, from the command line."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
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


app.command()(demo)
app.command()(ask)
app.command()(chat)
app.command()(ppl)
app.command()(scrolls)
app.command("lm-eval")(lm_eval)
app.command()(export)
app.command()(verify)
app.command()(serve)
app.command()(summarize)
app.command()(pack)
app.command("check-packed")(check_packed)
app.command()(match)
