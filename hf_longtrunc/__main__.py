"""The `hf-longtrunc` command; says what to install where the command line's own packages are missing."""

from __future__ import annotations

import sys

from hf_longtrunc.extras import missing


def main() -> None:
    """Run the command line."""
    try:
        from hf_longtrunc.cli.app import app
    except ModuleNotFoundError as error:
        print(f"hf-longtrunc: error: {missing('the command line', error.name, 'demo')}", file=sys.stderr)
        raise SystemExit(2) from error
    app()


if __name__ == "__main__":
    main()
