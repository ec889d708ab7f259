"""The command line: ``python -m torchprune_ext inspect FILE``."""

import argparse
import os
import sys
from collections.abc import Sequence

from torchprune_ext.deploy.inspection import describe, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line; by default the process's own.

    Returns:
        The exit code: 0, or 1 if the file cannot be read. Wrong arguments exit with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m torchprune_ext", description="Tools for pruned models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    said = "say what a file holds: each tensor's shape, dtype, encoding, density, bytes and history"
    inspect = commands.add_parser("inspect", help=said, description=said)
    inspect.add_argument(
        "file", metavar="FILE", help="a file of save_sparse, a safetensors file, or a checkpoint (.pt)"
    )
    options = parser.parse_args(arguments)
    try:
        text = describe(options.file)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:  # as when piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
