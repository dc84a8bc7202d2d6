"""The CPU as a card on which steps are captured: a function that is run again stands for a graph."""

import contextlib

import torch

from memformer.replay import capture

CPU = torch.device("cpu")
NOTHING_FROZEN = capture._nothing_frozen


def look_at_little(monkeypatch):
    """What the tests import stays hidden from the garbage collector, as ``conftest._frozen`` has it.

    A capture looks for what is trained among all that there is, which would take it a second. None of that is trained.
    """
    monkeypatch.setattr(capture, "_nothing_frozen", contextlib.nullcontext)


class PretendCard(capture.Card):
    """The CPU as a card: a launch runs the function again, and writes what it gives where a graph would write it."""

    rehearsals = 0
    forbidding = False

    @property
    def generator(self):
        return torch.default_generator

    def rehearse(self, function, strict=False):
        type(self).rehearsals += 1
        type(self).forbidding = strict
        try:
            return function()
        finally:
            type(self).forbidding = False

    def record(self, function, draws):
        # A capture runs no kernel, so it draws no numbers and leaves none but those of a launch.
        state = torch.get_rng_state()
        static = [x.clone() if isinstance(x, torch.Tensor) else x for x in function()]
        torch.set_rng_state(state)

        def launch():
            with torch.enable_grad():
                found = function()
            for old, new in zip(static, found, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return static, launch


def pretend_a_card(monkeypatch):
    """Makes the CPU a card for one test."""
    look_at_little(monkeypatch)
    monkeypatch.setattr(capture, "Card", PretendCard)
    monkeypatch.setattr(capture, "can_capture", lambda device: device == CPU)
    monkeypatch.setattr(PretendCard, "rehearsals", 0)
    return PretendCard
