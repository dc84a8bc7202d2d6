"""What learns in a benchmark: this model, with its memory and without, behind one interface that others can have too.

So one loop trains and judges them all alike. The repository's ``benchmarks`` has other packages' models behind it.
Knows neither data nor optimizer.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import replay
from ..causal import CausalMemformer
from ..config import MemformerConfig, MemoryLayout, as_before
from ..data.segments import Segment
from ..model import Memformer
from ..settings import ModelSettings
from ..tasks import START, Episode
from ..wavefront import read_segments

__all__ = [
    "OWN",
    "Build",
    "Contestant",
    "EncoderDecoder",
    "Outcome",
    "build",
    "number_of_parameters",
    "of_equal_size",
    "parameters",
    "sizes",
]


Network = TypeVar("Network", bound=nn.Module)


class Outcome(NamedTuple):
    """What a contestant makes of an episode.

    Attributes:
        logits: (answers, vocabulary), in the order of ``episode.tokens[episode.answers]``; each made from what stands
            before the answer alone.
        state: to go on with later segments of the same lanes; without a graph.
        extra_loss: what the contestant wants added to the loss; a scalar.
    """

    logits: Tensor
    state: Any
    extra_loss: Tensor

    def loss(self, episode: Episode) -> Tensor:
        """What is trained: the mean loss in nats over the episode's answers, and the extra loss."""
        return F.cross_entropy(self.logits, episode.tokens[episode.answers]) + self.extra_loss


class Contestant(nn.Module):
    """A model that reads an episode segment by segment and predicts its answers."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, episode: Episode, state: Any = None) -> Outcome:
        """Predict the answers of an episode, which goes on from ``state`` where there is one.

        Raises:
            ValueError: there is an answer in the first segment of all.
        """
        if state is None and episode.answers[:, 0].any():
            raise ValueError("answers: expected none in the first segment, for nothing stands before it")
        logits, state, extra_loss = self.read(episode, state)
        wanted = episode.answers[:, episode.answers.any(2).any(0)]
        return Outcome(logits[wanted], replay.detach(state), extra_loss)

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        """Logits (batch, segments with an answer, length, vocabulary), the state, and an extra loss.

        Where there is no answer, the logits are (batch, 0, length), for there is nothing to predict.
        """
        raise NotImplementedError

    @torch.no_grad()
    def numbers_carried(self, length: int) -> int:
        """How many numbers a lane carries from segment to segment of ``length`` tokens when its memory is full.

        Tensors are counted. Token ids are not: each contestant keeps the last, or those of the last segment.
        """
        tokens = torch.zeros(1, 2, length, dtype=torch.int64)
        episode, state = Episode(tokens, torch.zeros_like(tokens, dtype=torch.bool)), None
        episode.answers[:, -1] = True
        counts = [-2, -1]
        while counts[-1] > counts[-2]:
            _, state, _ = self(episode, state)
            counts.append(sum(x.numel() for x in tree_leaves(state) if isinstance(x, Tensor) and x.is_floating_point()))
        return counts[-1]


class EncoderDecoder(Contestant):
    """Reads a segment and predicts the next; its decoder runs once, on all segments in which there is an answer.

    The state is the memory and the last segment, which has not been read.
    """

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def decode(self, tokens: Tensor, encoded: Tensor, sources: Tensor) -> Tensor:
        """Logits after each of ``tokens``; ``encoded`` is what became of ``sources``. All first (batch, length)."""
        raise NotImplementedError

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        memory, last = (None, None) if state is None else state
        encoded, sources, targets = [], [], []
        for segment, wanted in zip(episode.tokens.unbind(1), episode.answers.any(2).any(0).tolist(), strict=True):
            if last is not None:
                seen, memory = self.encode(last, memory)
                if wanted:
                    encoded.append(seen)
                    sources.append(last)
                    targets.append(segment)
            last = segment
        if not targets:
            return episode.tokens[:, :0].float(), (memory, last), torch.zeros((), device=episode.tokens.device)
        started = F.pad(torch.stack(targets, 1)[..., :-1], (1, 0), value=START)
        logits = self.decode(*(x.flatten(0, 1) for x in (started, torch.stack(encoded, 1), torch.stack(sources, 1))))
        return logits.unflatten(0, started.shape[:2]), (memory, last), logits.new_zeros(())


class WithMemory(EncoderDecoder):
    """:class:`~memformer.Memformer`."""

    network: Memformer

    def __init__(self, config: MemformerConfig):
        super().__init__(Memformer(**config.to_dict()))

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.network.step(tokens, memory)

    def decode(self, tokens: Tensor, encoded: Tensor, sources: Tensor) -> Tensor:
        assert self.network.decoder is not None, "it is built with one"
        return self.network.decoder(tokens, encoded, src=sources)


class MemoryOff(WithMemory):
    """Each segment starts from the initial memory, so a prediction sees one segment back and no further."""

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().encode(tokens, None)[0], None


class Causal(Contestant):
    """:class:`~memformer.CausalMemformer`, with as many layers as both stacks together, which share out the slots.

    What its layers keep of the last tokens counts, too: as many rows in all, and a slot for each layer at least. The
    width of its feed-forwards is what gives it as many parameters.
    """

    network: CausalMemformer
    memory: MemoryLayout = "layers"
    parts: int | None = None  # in which slots are written and read, in place of the configuration's
    rereads = False  # whether a segment comes with the overlap before it

    def __init__(self, config: MemformerConfig):
        depth, self.overlap = config.enc_depth + config.dec_depth, config.dec_overlap
        rows = config.num_memory_slots - 1 - depth * self.overlap  # one is the output

        def make(feed: int) -> CausalMemformer:
            return CausalMemformer(
                dim=config.dim,
                num_memory_slots=max(1, rows // depth if self.memory == "layers" else rows),
                num_tokens=config.vocabulary,
                max_seq_len=config.segment_length + self.overlap * self.rereads,
                depth=depth,
                heads=config.enc_heads,
                overlap=self.overlap,
                memory=self.memory,
                num_mem_updates=config.num_mem_updates,
                mem_update_attn_heads=self.parts or config.mem_update_attn_heads,
                memory_writer=config.memory_writer,
                slot_parts=self.parts or config.slot_parts,
                write_temperature=config.write_temperature,
                forgetting=config.forgetting,
                positions=config.positions,
                feed_forward_factor=feed / config.dim,
                dropout=config.dropout,
                tie_embeddings=config.tie_embeddings,
            )

        super().__init__(of_equal_size(make, range(1, 8 * config.dim), parameters(config)))

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        outputs, memory = self.outputs(episode.tokens, state)
        wanted = [x[:, :-1] for x, w in zip(outputs, episode.answers.any(2).any(0).tolist(), strict=True) if w]
        logits = self.network.head(torch.stack(wanted, 1)) if wanted else episode.tokens[:, :0].float()
        return logits, memory, logits.new_zeros(())

    def outputs(self, tokens: Tensor, memory: Any) -> tuple[Sequence[Tensor], Any]:
        """The last layer's, for each segment of (batch, segments, length), and the memory after them."""
        found: list[Tensor] = []
        segments = [Segment(segment) for segment in tokens.unbind(1)]
        memory = read_segments(self.network, segments, memory, found.append)
        return found, memory


class CausalOneMemory(Causal):
    """One memory for all layers, written from the last: what others mean by so many memory vectors."""

    memory = "one"


class CausalInParts(Causal):
    """Slots are written and read in eight parts, each by attention of its own."""

    parts = 8


class CausalMemoryOff(Causal):
    """Each segment begins a document, with the overlap read again before it: a prediction sees that and no further."""

    rereads = True

    def outputs(self, tokens: Tensor, memory: Any) -> tuple[Sequence[Tensor], Any]:
        """All segments at once. The memory is the last tokens, (batch, overlap)."""
        batch, segments, length = tokens.shape
        last = tokens.new_full((batch, self.overlap), START) if memory is None else memory
        last = torch.cat([last[:, None], tokens[:, :, length - self.overlap :]], 1)  # (batch, segments + 1, overlap)
        read = torch.cat([last[:, :-1], tokens], 2).flatten(0, 1)
        mask = None
        if memory is None:
            mask = torch.ones_like(read, dtype=torch.bool).view(batch, segments, -1)
            mask[:, 0, : self.overlap] = False
            mask = mask.flatten(0, 1)
        hidden, _ = self.network.step(read, None, mask)
        return hidden[:, self.overlap :].unflatten(0, (batch, segments)).unbind(1), last[:, -1]


def of_equal_size(make: Callable[[int], Network], choices: Sequence[int], parameters: int) -> Network:
    """The network whose number of parameters is nearest to ``parameters``; ``make`` takes a size, of ``choices``."""

    def count(choice: int) -> int:
        with torch.device("meta"):
            return number_of_parameters(make(choice))

    first = bisect.bisect_left(choices, parameters, key=count)
    near = choices[max(0, first - 1) : first + 1]
    return make(min(near, key=lambda choice: abs(count(choice) - parameters)))


def number_of_parameters(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def parameters(config: MemformerConfig) -> int:
    """How many the Memformer of a configuration has."""
    with torch.device("meta"):
        return number_of_parameters(Memformer(**config.to_dict()))


Build = Callable[[MemformerConfig], Contestant]
"""Makes a contestant with new weights, drawn from torch's global generator. The configuration is this model's; others
get about as many parameters, and carry about as many numbers from segment to segment.

Other processes build contestants too: what builds one must be found by its name there (a class, a function, or a
``functools.partial`` of these)."""

OWN: dict[str, Build] = {
    "memformer": WithMemory,
    "memory off": MemoryOff,
    "causal": Causal,
    "causal one memory": CausalOneMemory,
    "causal in parts": CausalInParts,
    "causal memory off": CausalMemoryOff,
}
"""By name: the models of this library, and each without its memory."""


def build(name: str, entrants: Mapping[str, Build], config: MemformerConfig) -> Contestant:
    """A contestant by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in entrants:
        raise ValueError(
            f"contestants: expected some of {', '.join(entrants)}, got {name!r}. Models of other packages take part in "
            "the repository: python -m benchmarks --help"
        )
    return entrants[name](config)


def sizes(model: ModelSettings) -> dict[str, object]:
    """By name, those of a model's settings from which a contestant is built; they are an encoder-decoder's."""
    every = as_before(dataclasses.asdict(model))
    left_out = {"architecture", "depth", "overlap", "memory_layout"}
    if not model.write_heads:
        left_out.add("write_heads")  # files from before know nothing of it
    return {name: every[name] for name in every if name not in left_out}
