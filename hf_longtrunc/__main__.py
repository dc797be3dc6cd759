"""The `hf-longtrunc` command; says what to install where the command line's own packages are missing."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    try:
        from hf_longtrunc.cli import app
    except ModuleNotFoundError as error:
        raise SystemExit(f"hf-longtrunc needs {error.name}: pip install 'hf_longtrunc[demo]'") from error
    app()


if __name__ == "__main__":
    main()
