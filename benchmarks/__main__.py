"""``python -m benchmarks``: one command for each benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from . import earlier, export, generate, lanes, learn, loader, overhead, pixels, positions, text, wavefront

_RUN: dict[type, Callable[[Any], Iterator[str]]] = {
    learn.Learn: learn.run,
    text.Text: text.run,
    generate.Generate: generate.run,
    earlier.EarlierLibrary: earlier.run,
    overhead.Overhead: overhead.run,
    positions.PositionsBenchmark: positions.run,
    loader.Loader: loader.run,
    lanes.LanesBenchmark: lanes.run,
    export.Export: export.run,
    pixels.PixelsBenchmark: pixels.run,
    wavefront.WavefrontBenchmark: wavefront.run,
}

_Command = (
    Annotated[learn.Learn, tyro.conf.subcommand("learn")]
    | Annotated[text.Text, tyro.conf.subcommand("text")]
    | Annotated[generate.Generate, tyro.conf.subcommand("generate")]
    | Annotated[earlier.EarlierLibrary, tyro.conf.subcommand("earlier")]
    | Annotated[overhead.Overhead, tyro.conf.subcommand("overhead")]
    | Annotated[positions.PositionsBenchmark, tyro.conf.subcommand("positions")]
    | Annotated[loader.Loader, tyro.conf.subcommand("loader")]
    | Annotated[lanes.LanesBenchmark, tyro.conf.subcommand("lanes")]
    | Annotated[export.Export, tyro.conf.subcommand("export")]
    | Annotated[pixels.PixelsBenchmark, tyro.conf.subcommand("pixels")]
    | Annotated[wavefront.WavefrontBenchmark, tyro.conf.subcommand("wavefront")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its report; 2 for a user's mistake."""
    settings: Any = tyro.cli(
        _Command,  # type: ignore[arg-type]
        prog="python -m benchmarks",
        description="Contests with other packages, and tables for the documents.",
        args=sys.argv[1:] if arguments is None else list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        for line in _RUN[type(settings)](settings):
            print(line, flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
