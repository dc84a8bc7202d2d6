"""Training on documents: ``Run(settings).train()`` yields metrics and leaves checkpoints that resume exactly."""

from ..device import choose_device
from .assemble import assemble
from .averaging import average
from .callbacks import Callback
from .documents import documents_for_test, documents_of
from .history import life, plot_life
from .initial import sized_as
from .metrics import StepMetrics, read_metrics
from .parts import Parts
from .resume import last_settings, saved_settings, settings_of
from .run import Run

__all__ = [
    "Callback",
    "Parts",
    "Run",
    "StepMetrics",
    "assemble",
    "average",
    "choose_device",
    "documents_for_test",
    "documents_of",
    "last_settings",
    "life",
    "plot_life",
    "read_metrics",
    "saved_settings",
    "settings_of",
    "sized_as",
]
