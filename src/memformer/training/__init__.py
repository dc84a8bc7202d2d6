"""Training on documents: ``Run(settings).train()`` yields metrics and leaves checkpoints that resume exactly."""

from ..device import choose_device
from .assemble import assemble
from .corpus import documents_of
from .metrics import StepMetrics
from .parts import Parts
from .resume import saved_settings, settings_of
from .run import Run

__all__ = [
    "Parts",
    "Run",
    "StepMetrics",
    "assemble",
    "choose_device",
    "documents_of",
    "saved_settings",
    "settings_of",
]
