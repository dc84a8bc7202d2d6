"""Training on documents: ``Run(settings).train()`` yields metrics and leaves checkpoints that resume exactly."""

from ..device import choose_device
from .assemble import assemble, documents_of
from .callbacks import Callback
from .history import life, plot_life
from .metrics import StepMetrics, read_metrics
from .parts import Parts
from .resume import saved_settings, settings_of
from .run import Run

__all__ = [
    "Callback",
    "Parts",
    "Run",
    "StepMetrics",
    "assemble",
    "choose_device",
    "documents_of",
    "life",
    "plot_life",
    "read_metrics",
    "saved_settings",
    "settings_of",
]
