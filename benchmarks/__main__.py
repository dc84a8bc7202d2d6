"""``python -m benchmarks``: one command for each benchmark. ``card`` alone runs where tyro is not installed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import card

if TYPE_CHECKING or importlib.util.find_spec("tyro") is not None:
    import tyro

    from . import earlier, export, generate, lanes, learn, loader, overhead, peak, pixels, positions, text, wavefront

    _RUN: dict[type, Callable[[Any], Iterator[str]]] = {
        learn.Learn: learn.run,
        text.Text: text.run,
        generate.Generate: generate.run,
        earlier.EarlierLibrary: earlier.run,
        overhead.Overhead: overhead.run,
        peak.PeakBenchmark: peak.run,
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
        | Annotated[peak.PeakBenchmark, tyro.conf.subcommand("peak")]
        | Annotated[positions.PositionsBenchmark, tyro.conf.subcommand("positions")]
        | Annotated[loader.Loader, tyro.conf.subcommand("loader")]
        | Annotated[lanes.LanesBenchmark, tyro.conf.subcommand("lanes")]
        | Annotated[export.Export, tyro.conf.subcommand("export")]
        | Annotated[pixels.PixelsBenchmark, tyro.conf.subcommand("pixels")]
        | Annotated[wavefront.WavefrontBenchmark, tyro.conf.subcommand("wavefront")]
        | Annotated[card.Card, tyro.conf.subcommand("card")]
    )


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
    try:
        if importlib.util.find_spec("tyro") is None:
            settings: Any = _without_tyro(given)
        else:
            settings = tyro.cli(
                _Command,  # type: ignore[arg-type]
                prog="python -m benchmarks",
                description="Contests with other packages, and tables for the documents.",
                args=given,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
        for line in (card.run if isinstance(settings, card.Card) else _RUN[type(settings)])(settings):
            print(line, flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
