"""``python -m memformer``: the command line."""

import atexit
import contextlib
import os
import sys

from .cli import main


def run() -> None:
    """Do what the command line says, and end the process."""
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # DistributedDataParallel keeps a group of processes alive after its end, and with it gloo's threads, which abort an
    # interpreter that is ending. So what it does at its end is done here.
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
