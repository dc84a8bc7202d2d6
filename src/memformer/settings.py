"""Settings of a training run: one frozen tree that checks itself, read from YAML or flags; recipes by name.

Knows the model's configuration and the schedules of replay, for it makes both. The text under a field is its help on
the command line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml

from . import replay
from .around import BASE_WRITE_HEADS, BaseSettings, check_others
from .checks import check_patterns
from .config import (
    CausalConfig,
    MemformerConfig,
    MemoryLayout,
    ModelConfig,
    Positions,
    Typed,
    Writer,
    check_count,
    check_positive,
)
from .learning_rate import warmup_constant, warmup_cosine, warmup_stable_decay
from .trees import build, from_yaml, to_flat, to_plain

__all__ = [
    "RECIPES",
    "ComputeSettings",
    "DocumentSettings",
    "EvaluationSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "OutputSettings",
    "RolloutSettings",
    "TrainingConfig",
    "absolute",
    "build",
    "called_here",
    "read_saved",
    "read_yaml",
    "to_flat",
    "to_plain",
    "to_yaml",
]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DocumentSettings(Typed):
    """How documents are read."""

    tokenizer: str = "bytes"
    """bytes; bpe, trained on the training documents; ids, for .npy and .bin arrays; or the path of a tokenizer.json."""
    vocabulary: int = 2048
    """The most tokens of a bpe that is trained here; with ids, how many ids there are."""
    include: tuple[str, ...] = ()
    """Of folders, read only what matches one of these patterns, such as '*.txt' or 'books/*'."""
    exclude: tuple[str, ...] = ()
    """Of folders, leave out what matches one of these patterns."""
    strict: bool = False
    """Refuse what is otherwise left out with a warning: unreadable files in folders, rows without a text."""
    text_field: str = "text"
    """The field that holds the text, in rows of .jsonl, .json, .csv, .parquet and the like."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array; without it, each array is one document."""
    bin_dtype: str = "uint16"
    """The integer type of a .bin file's tokens."""
    held_out: int = 48
    """Hold out one Nth of the data: whole documents, or the end of one where their sizes allow no such choice."""
    held_out_by: Literal["size", "name"] = "size"
    """size looks at how large the documents are; name at the hashes of their names alone, as earlier versions did."""
    held_out_data: tuple[Path, ...] = ()
    """Files and folders to evaluate on, in place of a part of --data."""
    test_data: tuple[Path, ...] = ()
    """Files and folders that training never looks at; the best checkpoint is measured on them at the end."""
    end: bool = True
    """Learn where documents end, as one more target of each; generated text then ends there, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("vocabulary", self.vocabulary)
        check_count("held_out", self.held_out, least=2)
        if self.held_out_data and self.held_out != type(self).held_out:
            raise ValueError(f"held_out: {self.held_out} has no meaning beside held_out_data; leave one of them out")
        for name in ("include", "exclude"):
            check_patterns(name, getattr(self, name))
        if self.separator is not None:
            check_count("separator", self.separator, least=0)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Typed):
    """Sizes of the model. Its vocabulary comes from the tokenizer."""

    architecture: Literal["memformer", "causal"] = "memformer"
    """memformer, an encoder that remembers and a decoder; or causal, one stack in which every layer does both."""
    dim: int = 64
    """Width of the model."""
    slots: int = 16
    """Memory slots; of a causal model, in each of its memories."""
    enc_depth: int = 1
    """Encoder layers."""
    dec_depth: int = 2
    """Decoder layers."""
    dec_overlap: int = 4
    """How many tokens of the previous segment the decoder also sees."""
    depth: int = 3
    """Layers of a causal model."""
    overlap: int = 4
    """How many tokens of the previous segment each layer of a causal model also sees."""
    memory_layout: MemoryLayout = "layers"
    """Of a causal model: layers, a memory in each layer; one, a memory that all layers read."""
    heads: int = 4
    """Attention heads of all layers, and of the reading of the memory."""
    mem_updates: int = 1
    """How often the memory is written per segment."""
    memory_writer: Writer = "normalised"
    """How the memory is written: normalised (paper v2), gated (as in the earlier library), or placed (each head of a
    slot begins with a place of its own in a segment, for what has to be found again at once)."""
    write_temperature: float = 0.25
    """Temperature of the writing attention; below 1 makes it sharper."""
    forgetting: float = 0.001
    """Of the normalised writer: length at construction of the bias vectors, which pull slots back to where they began
    with each write; 0: only what is written over is forgotten."""
    slot_parts: int = 1
    """In how many parts a slot is read, each by attention of its own."""
    write_heads: int = 0
    """Heads of the attention that writes; 0: as many as a slot has parts, and with one part as the other layers have (8
    around a pretrained model)."""
    positions: Positions = "rotary"
    """How attention knows where a token stands."""
    dropout: float = 0.0
    """Dropout probability, on the output of every sublayer."""
    tie_embeddings: bool = True
    """One matrix for both embeddings and the output projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "dim",
            "slots",
            "enc_depth",
            "dec_depth",
            "depth",
            "overlap",
            "heads",
            "mem_updates",
            "slot_parts",
        ):
            check_count(name, getattr(self, name))
        for name in ("dec_overlap", "write_heads"):
            check_count(name, getattr(self, name), least=0)
        others = next(own for architecture, own in _OWN.items() if architecture != self.architecture)
        for name in others:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}: {getattr(self, name)} has no meaning with the architecture {self.architecture}, which "
                    f"has {', '.join(_OWN[self.architecture])}; leave one of the two out"
                )

    def config(self, vocabulary: int, segment_length: int) -> ModelConfig:
        """The model's configuration. Raises ValueError where settings do not fit together."""
        if self.architecture == "memformer":
            return self.memformer_config(vocabulary, segment_length)
        try:
            return CausalConfig(
                **{name: getattr(self, name) for name in _SAME},
                num_memory_slots=self.slots,
                num_mem_updates=self.mem_updates,
                num_tokens=vocabulary,
                max_seq_len=segment_length,
                depth=self.depth,
                overlap=self.overlap,
                memory=self.memory_layout,
                heads=self.heads,
                mem_update_attn_heads=self.writing_heads(self.heads),
                dropout=self.dropout,
            )
        except ValueError as error:
            raise ValueError(called_here(str(error))) from error

    def writing_heads(self, usual: int) -> int:
        """How many heads write, where ``usual`` ones write slots of one part."""
        return self.write_heads or (usual if self.slot_parts == 1 else self.slot_parts)

    def memformer_config(self, vocabulary: int, segment_length: int) -> MemformerConfig:
        """That of a Memformer. Raises ValueError for another architecture, and where settings do not fit together."""
        if self.architecture != "memformer":
            raise ValueError(f"architecture: expected memformer, got {self.architecture}")
        try:
            return MemformerConfig(
                **{name: getattr(self, name) for name in (*_SAME, *_OWN["memformer"])},
                num_memory_slots=self.slots,
                num_mem_updates=self.mem_updates,
                enc_num_tokens=vocabulary,
                enc_max_seq_len=segment_length,
                enc_heads=self.heads,
                dec_num_tokens=vocabulary,
                dec_max_seq_len=segment_length + 1,
                dec_heads=self.heads,
                mem_update_attn_heads=self.writing_heads(self.heads),
                dropout=self.dropout,
            )
        except ValueError as error:
            raise ValueError(called_here(str(error))) from error

    @classmethod
    def of(cls, config: ModelConfig, dropout: float) -> ModelSettings:
        """Those of a model that there is, but for its dropout."""
        known: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
        known |= {"slots": config.num_memory_slots, "dropout": dropout}
        if isinstance(config, CausalConfig):
            known |= {"architecture": "causal", "depth": config.depth, "overlap": config.overlap}
            known |= {"memory_layout": config.memory, "heads": config.heads, "mem_updates": config.num_mem_updates}
        elif isinstance(config, MemformerConfig):
            known |= {name: getattr(config, name) for name in _OWN["memformer"]}
            known |= {"heads": config.enc_heads, "mem_updates": config.num_mem_updates}
        settings = cls(**known)
        if config.mem_update_attn_heads == settings.writing_heads(settings.heads):
            return settings
        return dataclasses.replace(settings, write_heads=config.mem_update_attn_heads)


def called_here(text: str) -> str:
    """What a configuration says, with the names that the settings have for it."""
    return re.sub("|".join(_CALLED), lambda name: _CALLED[name[0]], text)


_CALLED = {
    "mem_update_attn_heads": "write_heads", "num_mem_updates": "mem_updates", "num_memory_slots": "slots",
    "enc_heads": "heads", "enc_max_seq_len": "segment_length", "dec_max_seq_len": "segment_length",
    "max_seq_len": "segment_length",
}  # fmt: skip


_OWN = {"memformer": ("enc_depth", "dec_depth", "dec_overlap"), "causal": ("depth", "overlap", "memory_layout")}
"""The settings that are of one architecture alone."""
_SAME = ("dim", "memory_writer", "write_temperature", "forgetting", "slot_parts", "positions", "tie_embeddings")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Typed):
    """The odds of the paper's objectives (v1, section 2.3), drawn for each lane and segment."""

    continuation: float = 1.0
    """Read a segment, write the next one."""
    infilling: float = 0.0
    """Read a segment with spans masked, write the whole segment."""
    recall: float = 0.0
    """Read a segment, write the one before it, which only the memory knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("continuation", "infilling", "recall"):
            _check_not_negative(name, getattr(self, name))
        if self.continuation + self.infilling + self.recall <= 0:
            raise ValueError("continuation, infilling, recall: expected one of the odds above 0, got none")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Typed):
    """What a step reads, how far its gradients go back, and how they travel."""

    lanes: int = 12
    """Documents read side by side, over all processes: the batch size."""
    segment_length: int = 32
    """Tokens per segment."""
    horizon: int = 6
    """Segments per rollout: how far gradients go back."""
    horizon_start: int | None = None
    """Horizon of the first step; it then grows to --horizon in --horizon-steps."""
    horizon_steps: int = 1000
    """Steps over which the horizon grows."""
    accumulate: int = 1
    """Rollouts per step, one after the other in the same documents."""
    spread: bool = True
    """Cut long documents into stretches, so that the lanes read different text; otherwise each is read by one lane."""
    stretch: int | None = None
    """Segments of a stretch, at most, so that memories often begin anew; by default a lane's fair share."""
    schedule: str = "every"
    """Which memories replay stores: every; binomial:N, at most N; budget:SIZE (2GB), the fastest way that fits."""
    graphs: int | None = None
    """Keep the graphs of the last N segments, which then do not run twice; by default with every memory as many as fit
    into 256 MB, and one at least. A budget chooses N itself."""
    offload: str | None = None
    """Where stored memories are kept: cpu, or a folder on a disk; by default on the device."""
    readout_tokens: int | None = None
    """Predict this many tokens at once, in whole segments: fewer take less memory. By default what suits the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lanes", "segment_length", "horizon", "horizon_steps", "accumulate"):
            check_count(name, getattr(self, name))
        for name, least in (("graphs", 0), ("horizon_start", 1), ("readout_tokens", 1), ("stretch", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        if self.stretch is not None and not self.spread:
            raise ValueError("stretch: with --no-spread documents are not cut; leave one of the two out")
        self.replay_schedule()
        if (self.horizon_start or 0) > self.horizon:
            raise ValueError(f"horizon_start: expected at most the horizon {self.horizon}, got {self.horizon_start}")
        if self.readout_tokens is not None and self.horizon == 1:
            raise ValueError("readout_tokens: has no meaning with a horizon of 1, which is one segment; leave it out")

    def horizon_at(self, step: int) -> int:
        """The horizon of a step, counted from 0: a line from ``horizon_start`` to ``horizon``."""
        if self.horizon_start is None:
            return self.horizon
        grown = (self.horizon - self.horizon_start) * min(step / self.horizon_steps, 1.0)
        return self.horizon_start + int(grown)

    def replay_schedule(self, fitting: int = 1) -> replay.Schedule:
        """What ``schedule``, ``graphs`` and ``offload`` say, as the engine takes it.

        Args:
            fitting: how many graphs to keep beside every memory, where ``graphs`` does not say.

        Raises:
            ValueError: there is no such schedule, or ``graphs`` has no meaning with it.
        """
        kind, _, size = self.schedule.partition(":")
        schedule: replay.Schedule
        if self.schedule == "every":
            schedule = replay.EveryMemory(fitting if self.graphs is None else self.graphs)
        elif kind == "binomial" and re.fullmatch(r"[1-9]\d*", size):
            schedule = replay.Binomial(int(size), 1 if self.graphs is None else self.graphs)
        elif kind == "budget" and (most := _bytes(size)):
            if self.graphs not in (None, 1):  # 1 was the default of runs that were saved with it
                raise ValueError(f"graphs: a budget chooses how many are kept; leave it out, got {self.graphs}")
            schedule = replay.Budget(most)
        else:
            of_rates = get_args(get_type_hints(OptimizerSettings)["learning_rate_schedule"])
            also = ", which is a learning_rate_schedule" if self.schedule in of_rates else ""
            raise ValueError(
                "schedule: expected every, binomial:N (such as binomial:16) or budget:SIZE (such as budget:2GB; units "
                f"are {', '.join(_UNITS)}), got {self.schedule!r}{also}"
            )
        return schedule if self.offload is None else replay.Offload(schedule, self.offload)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Typed):
    """How a step changes the weights, and the learning rate's curve: a line up, then as its schedule says."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon, for the matrices of linear maps inside the model, beside adamw for all else."""
    learning_rate: float = 3e-3
    """The highest learning rate, at the end of the warm-up; muon's steps are scaled to the size of adamw's."""
    warmup: int = 50
    """Steps over which the learning rate rises."""
    learning_rate_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine falls until the end; wsd stays, then falls along a line; constant stays."""
    decay_share: float = 0.2
    """With wsd, the share of the steps, at their end, over which the learning rate falls."""
    least: float = 0.0
    """The learning rate of cosine and wsd at the end, as a share of the highest."""
    beta1: float = 0.9
    """adamw's decay of the mean gradient."""
    beta2: float = 0.98
    """adamw's decay of the mean squared gradient."""
    eps: float = 1e-8
    """adamw adds this to what it divides by."""
    weight_decay: float = 0.1
    """Weight decay; its step is this times the learning rate."""
    decay_of: Literal["linear", "matrices"] = "linear"
    """What decays: linear, the matrices of linear maps inside the model; matrices, embeddings and memory slots too."""
    clip: float = 1.0
    """Clip the gradient to this norm; 0 or inf: do not clip."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and saved as the model; 0: none."""
    skip_non_finite: int = 0
    """Leave out a step whose gradient is not finite, at most this many in a row; 0: that is an error."""

    def __post_init__(self) -> None:
        if self.clip == math.inf:  # one value for one meaning, which JSON has
            object.__setattr__(self, "clip", 0.0)
        super().__post_init__()
        for name in ("learning_rate", "eps"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "clip"):
            _check_not_negative(name, getattr(self, name))
        for name in ("warmup", "skip_non_finite"):
            check_count(name, getattr(self, name), least=0)
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a decay in [0, 1), got {getattr(self, name)}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share: expected a share of the steps in (0, 1], got {self.decay_share}")
        if self.decay_share != type(self).decay_share and self.learning_rate_schedule != "wsd":
            raise ValueError(
                f"decay_share: {self.decay_share} is for learning_rate_schedule wsd, got {self.learning_rate_schedule}"
            )
        if not 0 <= self.least <= 1:
            raise ValueError(f"least: expected a share of the learning rate in [0, 1], got {self.least}")
        if self.least and self.learning_rate_schedule == "constant":
            raise ValueError(f"least: {self.least} is where the learning rate falls to, but constant does not fall")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, in a training of ``steps``."""
        if self.learning_rate_schedule == "constant":
            share = warmup_constant(step, self.warmup)
        elif self.learning_rate_schedule == "wsd":
            share = warmup_stable_decay(step, steps, self.warmup, self.decay_share * steps, self.least)
        else:
            share = warmup_cosine(step, steps, self.warmup, self.least)
        return self.learning_rate * share


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Typed):
    """Precision and processes. Under torchrun the lanes are divided among the processes."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Type for autocast; auto is bf16 on an accelerator that computes it natively, else float32."""
    compile: bool = False
    """Compile encoder and decoder, or a causal model's stack: a slow start, then faster steps."""
    capture: Literal["auto", "on", "off"] = "auto"
    """On CUDA, launch each rollout with its backward as one graph; auto where that can be, on or else refuse."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a copy of the model in each process, or its parameters divided among them."""
    timeout: float = 30.0
    """Minutes after which a process that waits for another one gives up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected a number of minutes above 0, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Typed):
    """Evaluation on held-out documents, read whole with the memory carried on; the best checkpoint is kept."""

    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0: never."""
    eval_limit: int = 2_000_000
    """Read at most this many held-out bytes (or ids); 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_every", "patience", "eval_limit"):
            check_count(name, getattr(self, name), least=0)
        if self.patience and not self.eval_every:
            raise ValueError(f"patience: {self.patience} counts evaluations, but eval_every is 0: set it")


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Typed):
    """What is written and shown, and when."""

    log_every: int = 50
    """Steps between lines of metrics."""
    save_every: int = 400
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the metrics there: tensorboard (OUT/tensorboard), wandb (Weights & Biases), trackio."""
    tensorboard: bool = False
    """The same as --loggers tensorboard."""
    sample_tokens: int = 300
    """Tokens of a sample of the model's writing, which is shown at the end; 0: none."""
    sample_every: int = 0
    """Steps between samples while training, into OUT/samples.jsonl and the loggers; 0: only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("log_every", "save_every", "keep"):
            check_count(name, getattr(self, name))
        for name in ("sample_tokens", "sample_every"):
            check_count(name, getattr(self, name), least=0)
        if self.sample_every and not self.sample_tokens:
            raise ValueError(f"sample_every: {self.sample_every} asks for samples, but sample_tokens is 0: set it")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Typed):
    """The settings of a training run: memory replay over long documents, its memory carried from rollout to rollout."""

    data: tuple[Path, ...] = ()
    """Files, folders: text, rows (.jsonl, ...), ids (.npy, ...), compressed or not; by default Python's own sources."""
    out: Path = Path("runs/default")
    """Folder for checkpoints and metrics.jsonl."""
    steps: int = 1200
    """Optimizer steps."""
    seed: int = 0
    """Decides the initial weights, dropout, objectives and the order of documents."""
    resume: bool = False
    """Go on from the newest undamaged checkpoint in --out, with the settings saved there and the flags given here."""
    auto_resume: bool = False
    """Go on if --out holds a run, else start one: the same command each time, for machines that may be taken away."""
    new_data: bool = False
    """Go on with other documents than before. They are read from their start; weights and optimizer stay."""
    init_from: Path | None = None
    """Start a new run with the weights and the tokenizer of this model, or of this run's best checkpoint."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""

    documents: DocumentSettings = field(default_factory=DocumentSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    around: BaseSettings = field(default_factory=BaseSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("seed", self.seed, least=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected less than 2**63, got {self.seed}")
        how = self.documents
        if not (self.data or how.held_out_data or how.test_data):
            for name in ("include", "exclude", "separator", "text_field", "bin_dtype"):
                if getattr(how, name) != getattr(DocumentSettings, name):
                    raise ValueError(f"{name}: Python's own sources, read without --data, have none; give --data")
        if self.around.base is not None:
            check_others(self)
            return
        if self.model.architecture == "causal":
            self._check_causal()
        self.model.config(1, self.rollout.segment_length)  # what does not fit together is found here
        if self.model.tie_embeddings and self.compute.parallel == "fsdp":
            raise ValueError(
                "tie_embeddings: FSDP cannot share a matrix between two parts of a model; add --no-tie-embeddings, or "
                "use --parallel ddp"
            )
        if self.compute.precision == "fp16" and self.compute.parallel == "fsdp":
            raise ValueError("precision: fp16 scales the loss, which FSDP's accumulation does not; use bf16")
        if self.optimizer.optimizer == "muon" and self.compute.parallel == "fsdp":
            raise ValueError("optimizer: muon needs whole matrices, which FSDP divides; use adamw, or --parallel ddp")
        if self.rollout.replay_schedule().needs_sizes and self.compute.parallel == "fsdp":
            raise ValueError(
                "schedule: a budget measures a segment's graph, which FSDP fills with gathered weights; "
                "use every or binomial:N"
            )

    def _check_causal(self) -> None:
        for name in ("infilling", "recall"):
            if getattr(self.objective, name):
                raise ValueError(
                    f"{name}: a causal model predicts what it reads, so continuation is its one objective; leave it "
                    "out, or use --architecture memformer"
                )


def _check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")


_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def _bytes(size: str) -> int | None:
    """2GB, 1.5 GiB, ... as a number of bytes; None if it is none of at least one byte."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", size)
    factor = found and {unit.lower(): value for unit, value in _UNITS.items()}.get(found[2].lower())
    return int(float(found[1]) * factor) if found and factor else None


# --- Recipes ----------------------------------------------------------------------------------------------------------

RECIPES: dict[str, TrainingConfig] = {
    "tiny": TrainingConfig(),
    "paper-v1": TrainingConfig(
        steps=400_000,
        documents=DocumentSettings(tokenizer="bpe", vocabulary=32_000),
        model=ModelSettings(
            dim=512, slots=32, enc_depth=4, dec_depth=8, dec_overlap=0, heads=8, memory_writer="gated",
            write_temperature=1.0, positions="relative", tie_embeddings=False,
        ),
        objective=ObjectiveSettings(continuation=0.6, infilling=0.3, recall=0.1),
        rollout=RolloutSettings(lanes=64, segment_length=64, horizon=8),
        optimizer=OptimizerSettings(learning_rate=2.5e-4, warmup=4000, weight_decay=0.01),
        evaluation=EvaluationSettings(eval_every=5000),
        output=OutputSettings(log_every=100, save_every=5000),
    ),
    "paper-v2": TrainingConfig(
        steps=400_000,
        documents=DocumentSettings(tokenizer="bpe", vocabulary=32_000),
        model=ModelSettings(dim=512, slots=64, enc_depth=4, dec_depth=8, dec_overlap=0, heads=8, tie_embeddings=False),
        rollout=RolloutSettings(lanes=64, segment_length=64, horizon=8),
        optimizer=OptimizerSettings(learning_rate=2.5e-4, warmup=4000, weight_decay=0.01),
        evaluation=EvaluationSettings(eval_every=5000),
        output=OutputSettings(log_every=100, save_every=5000),
    ),
    "causal-tiny": TrainingConfig(model=ModelSettings(architecture="causal", slots=5)),
    "causal": TrainingConfig(
        steps=400_000,
        documents=DocumentSettings(tokenizer="bpe", vocabulary=32_000),
        model=ModelSettings(architecture="causal", dim=512, slots=8, depth=12, heads=8),
        rollout=RolloutSettings(lanes=64, segment_length=64, horizon=8),
        optimizer=OptimizerSettings(learning_rate=2.5e-4, warmup=4000, weight_decay=0.01),
        evaluation=EvaluationSettings(eval_every=5000),
        output=OutputSettings(log_every=100, save_every=5000),
    ),
}  # fmt: skip
"""``tiny``: two minutes on two cores; ``causal-tiny``: the same with a causal model. ``paper-v1``, ``paper-v2``: the
shapes, slots, segments and objectives of the two versions' language models, for a GPU; what the papers do not say
(vocabulary, lanes, learning rate, steps) is ours. ``causal``: a causal model of as many layers, for a GPU."""


# --- Plain data in, settings out --------------------------------------------------------------------------------------


def read_yaml(file: Path, base: TrainingConfig) -> TrainingConfig:
    """``base``, changed by a YAML file.

    Raises:
        ValueError: it is not YAML, or has an unknown key (the nearest is named) or a wrong value.
        OSError: it cannot be read.
    """
    try:
        values = from_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return build(TrainingConfig, {} if values is None else _moved(values), base=base)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def to_yaml(settings: TrainingConfig) -> str:
    """Every setting, so that ``--config FILE`` repeats the run."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False)


def absolute(settings: T) -> T:
    """Settings whose paths of what is read do not depend on the working directory; ``out`` stays as it is."""
    changes: dict[str, object] = {}
    for f in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = absolute(value)
        elif isinstance(value, Path) and f.name != "out":
            changes[f.name] = value.absolute()
        elif isinstance(value, tuple):
            changes[f.name] = tuple(part.absolute() if isinstance(part, Path) else part for part in value)
        elif f.name == "tokenizer" and value not in ("bytes", "bpe", "ids"):
            changes[f.name] = str(Path(value).absolute())
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


FORMER: dict[str, dict[str, object]] = {
    "documents": {"held_out_by": "name", "end": False},
    "rollout": {"spread": False},
    "optimizer": {"decay_of": "matrices"},
}
"""What a field that is newer than a saved run meant before there was one, where that is not its default today."""


def _moved(values: Any) -> Any:
    """Plain settings in which ``write_heads`` is the model's: before, it was there around a pretrained one alone.

    Where it cannot have been meant so it stays, and is refused as unknown.
    """
    around, model = (values.get(name, {}) if isinstance(values, Mapping) else None for name in ("around", "model"))
    if not isinstance(around, Mapping) or not isinstance(model, Mapping) or "write_heads" not in around:
        return values
    heads, usual = around["write_heads"], BASE_WRITE_HEADS
    if around.get("base") is not None:
        usual = ModelSettings(slot_parts=model.get("slot_parts", 1)).writing_heads(BASE_WRITE_HEADS)
        model = model if heads == usual else {"write_heads": heads, **model}
    elif heads != usual:
        return values
    return {**values, "model": model, "around": {name: around[name] for name in around if name != "write_heads"}}


def read_saved(values: Mapping[str, Any]) -> TrainingConfig:
    """The settings that a run saved; what they do not name is as it was before it could be set.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    values = _moved(values)
    former = {group: {**fields, **values.get(group, {})} for group, fields in FORMER.items()}
    return build(TrainingConfig, {**values, **former})
