"""``python -m benchmarks``: one command for each benchmark. ``card`` alone runs where tyro is not installed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from . import card

if TYPE_CHECKING or importlib.util.find_spec("tyro") is not None:
    import tyro

    from . import earlier, export, generate, lanes, learn, loader, overhead, peak, pixels, positions, text, wavefront

    _COMMANDS: dict[str, tuple[type, Callable[[Any], Iterator[str]]]] = {
        "learn": (learn.Learn, learn.run),
        "text": (text.Text, text.run),
        "generate": (generate.Generate, generate.run),
        "earlier": (earlier.EarlierLibrary, earlier.run),
        "overhead": (overhead.Overhead, overhead.run),
        "peak": (peak.PeakBenchmark, peak.run),
        "positions": (positions.PositionsBenchmark, positions.run),
        "loader": (loader.Loader, loader.run),
        "lanes": (lanes.LanesBenchmark, lanes.run),
        "export": (export.Export, export.run),
        "pixels": (pixels.PixelsBenchmark, pixels.run),
        "wavefront": (wavefront.WavefrontBenchmark, wavefront.run),
        "card": (card.Card, card.run),
    }
    _COMMAND: Any = Union[  # noqa: UP007
        tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in _COMMANDS.items())
    ]


def _without_tyro(arguments: list[str]) -> card.Card:
    """The settings of ``card``, which is all that there is then."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks card", description=card.Card.__doc__)
    if arguments[:1] != ["card"]:
        parser.error("tyro is not installed (pip install -e '.[dev]'): only card runs without it")
    for field in dataclasses.fields(card.Card):
        kind = Path if field.default is None else type(field.default)
        how: Any = {"action": "store_true"} if field.default is False else {"type": kind}
        parser.add_argument(f"--{field.name}", default=field.default, **how)
    return card.Card(**vars(parser.parse_args(arguments[1:])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its report; 2 for a user's mistake."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    run: Callable[[Any], Iterator[str]] = card.run
    try:
        if importlib.util.find_spec("tyro") is None:
            settings: Any = _without_tyro(given)
        else:
            settings = tyro.cli(
                _COMMAND,
                prog="python -m benchmarks",
                description="Contests with other packages, and tables for the documents.",
                args=given,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
            run = dict(_COMMANDS.values())[type(settings)]
        for line in run(settings):
            print(line, flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
