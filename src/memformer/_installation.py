"""This package as it is installed: its version, and whether the earlier library of the same name is in its way.

The earlier library (distribution ``memformer``) and this one (``memformer-replay``) both install a package named
``memformer``; in one folder each overwrites files of the other. The search is made once, when this module is imported,
and takes milliseconds.
"""

import importlib.metadata
import warnings
from pathlib import Path

__all__ = ["__version__"]

__version__ = "1.0.0.dev0"
"""The version, here and nowhere else: the build reads it from this line."""


def _look_for_the_earlier_library() -> None:
    try:
        earlier = importlib.metadata.distribution("memformer")
    except importlib.metadata.PackageNotFoundError:
        return
    theirs, here = Path(str(earlier.locate_file("memformer"))), Path(__file__).parent
    if not (theirs / "memformer.py").is_file():  # its main module in all of its versions; this package has none
        return
    name = f"the earlier library of this name (distribution memformer {earlier.version})"
    if theirs.resolve() == here.resolve():
        raise ImportError(
            f"memformer: {name} is installed in the same folder, {here.parent}, and the two have overwritten files of "
            "each other. Uninstall both (pip uninstall memformer memformer-replay), then install the one that you want",
            name="memformer",
        )
    warnings.warn(
        f"memformer: {name} is installed too, in {theirs.parent}; what is imported is memformer-replay, from "
        f"{here.parent}. Uninstall the one that you do not use",
        stacklevel=2,
    )


_look_for_the_earlier_library()
