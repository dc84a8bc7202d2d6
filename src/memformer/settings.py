"""Settings of a training run: one frozen tree that checks itself, read from YAML or flags; recipes by name.

Knows the model's configuration and the schedules of replay, for it makes both. The text under a field is its help on
the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from . import replay
from .config import MemformerConfig, Positions, Writer, check_count

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
    "build",
    "read_saved",
    "read_yaml",
    "to_flat",
    "to_plain",
    "to_yaml",
]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """How documents are read."""

    tokenizer: str = "bytes"
    """bytes; bpe, trained on the training documents; ids, for .npy and .bin arrays; or the path of a tokenizer.json."""
    vocabulary: int = 2048
    """The most tokens of a bpe that is trained here; with ids, how many ids there are."""
    text_field: str = "text"
    """The field of a .jsonl file's lines that holds the text."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array; without it, each array is one document."""
    bin_dtype: str = "uint16"
    """The integer type of a .bin file's tokens."""
    held_out: int = 48
    """Hold out one document in N; of a single document, hold out the last Nth."""

    def __post_init__(self) -> None:
        check_count("vocabulary", self.vocabulary)
        if not isinstance(self.held_out, int) or self.held_out < 2:
            raise ValueError(f"held_out: expected a whole number of at least 2, got {self.held_out!r}")
        if self.separator is not None:
            _check_not_negative("separator", self.separator)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Sizes of the model. Its vocabulary comes from the tokenizer."""

    dim: int = 64
    """Width of the model."""
    slots: int = 16
    """Memory slots."""
    enc_depth: int = 1
    """Encoder layers."""
    dec_depth: int = 2
    """Decoder layers."""
    dec_overlap: int = 4
    """How many tokens of the previous segment the decoder also sees."""
    heads: int = 4
    """Attention heads of the encoder, the decoder, and the reading and writing of the memory."""
    mem_updates: int = 1
    """How often the memory is written per segment."""
    memory_writer: Writer = "normalised"
    """How the memory is written: normalised (paper v2) or gated (as in the earlier library)."""
    write_temperature: float = 0.25
    """Temperature of the writing attention; below 1 makes it sharper."""
    positions: Positions = "rotary"
    """How attention knows where a token stands."""
    dropout: float = 0.0
    """Dropout probability, on the output of every sublayer."""
    tie_embeddings: bool = True
    """One matrix for both embeddings and the output projection."""

    def __post_init__(self) -> None:
        for name in ("dim", "slots", "enc_depth", "dec_depth", "heads", "mem_updates"):
            check_count(name, getattr(self, name))
        check_count("dec_overlap", self.dec_overlap, least=0)

    def config(self, vocabulary: int, segment_length: int) -> MemformerConfig:
        """The model's configuration. Raises ValueError where settings do not fit together."""
        same = dataclasses.asdict(self)
        slots, heads, updates = (same.pop(name) for name in ("slots", "heads", "mem_updates"))
        return MemformerConfig(
            **same,
            num_memory_slots=slots,
            num_mem_updates=updates,
            enc_num_tokens=vocabulary,
            enc_max_seq_len=segment_length,
            enc_heads=heads,
            dec_num_tokens=vocabulary,
            dec_max_seq_len=segment_length + 1,
            dec_heads=heads,
            mem_update_attn_heads=heads,
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The odds of the paper's objectives (v1, section 2.3), drawn for each lane and segment."""

    continuation: float = 1.0
    """Read a segment, write the next one."""
    infilling: float = 0.0
    """Read a segment with spans masked, write the whole segment."""
    recall: float = 0.0
    """Read a segment, write the one before it, which only the memory knows."""

    def __post_init__(self) -> None:
        for name in ("continuation", "infilling", "recall"):
            _check_not_negative(name, getattr(self, name), whole=False)
        if self.continuation + self.infilling + self.recall <= 0:
            raise ValueError("continuation, infilling, recall: expected one of the odds above 0, got none")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
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
    schedule: str = "every"
    """Which memories replay stores: every; binomial:N, at most N; budget:SIZE (2GB), the fastest way that fits."""
    graphs: int = 1
    """Keep the graphs of the last N segments, which then do not run twice. A budget chooses N itself."""
    offload: str | None = None
    """Where stored memories are kept: cpu, or a folder on a disk; by default on the device."""

    def __post_init__(self) -> None:
        for name in ("lanes", "segment_length", "horizon", "horizon_steps", "accumulate"):
            check_count(name, getattr(self, name))
        check_count("graphs", self.graphs, least=0)
        self.replay_schedule()
        if self.horizon_start is not None:
            check_count("horizon_start", self.horizon_start)
            if self.horizon_start > self.horizon:
                raise ValueError(
                    f"horizon_start: expected at most the horizon {self.horizon}, got {self.horizon_start}"
                )

    def horizon_at(self, step: int) -> int:
        """The horizon of a step, counted from 0: a line from ``horizon_start`` to ``horizon``."""
        if self.horizon_start is None:
            return self.horizon
        grown = (self.horizon - self.horizon_start) * min(step / self.horizon_steps, 1.0)
        return self.horizon_start + int(grown)

    def replay_schedule(self) -> replay.Schedule:
        """What ``schedule``, ``graphs`` and ``offload`` say, as the engine takes it.

        Raises:
            ValueError: there is no such schedule, or ``graphs`` has no meaning with it.
        """
        kind, _, size = self.schedule.partition(":")
        schedule: replay.Schedule
        if self.schedule == "every":
            schedule = replay.EveryMemory(self.graphs)
        elif kind == "binomial" and re.fullmatch(r"[1-9]\d*", size):
            schedule = replay.Binomial(int(size), self.graphs)
        elif kind == "budget" and (most := _bytes(size)):
            if self.graphs != 1:
                raise ValueError(
                    f"graphs: a budget chooses how many are kept; expected 1, which is the default, got {self.graphs}"
                )
            schedule = replay.Budget(most)
        else:
            raise ValueError(
                "schedule: expected every, binomial:N (such as binomial:16) or budget:SIZE (such as budget:2GB; units "
                f"are {', '.join(_UNITS)}), got {self.schedule!r}"
            )
        return schedule if self.offload is None else replay.Offload(schedule, self.offload)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW; the learning rate rises along a line, then falls to zero along a cosine."""

    learning_rate: float = 3e-3
    """The highest learning rate, at the end of the warm-up."""
    warmup: int = 50
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Weight decay, of matrices only."""
    clip: float = 1.0
    """Clip the gradient to this norm; 0: do not clip."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and saved as the model; 0: none."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        for name in ("weight_decay", "clip"):
            _check_not_negative(name, getattr(self, name), whole=False)
        _check_not_negative("warmup", self.warmup)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Precision and processes. Under torchrun the lanes are divided among the processes."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Type for autocast; auto is bf16 on an accelerator that computes it natively, else float32."""
    compile: bool = False
    """Compile encoder and decoder with torch.compile: a slow start, then faster steps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a copy of the model in each process, or its parameters divided among them."""
    timeout: float = 30.0
    """Minutes after which a process that waits for another one gives up."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected a number of minutes above 0, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation on held-out documents, read whole with the memory carried on; the best checkpoint is kept."""

    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0: never."""
    eval_limit: int = 2_000_000
    """Read at most this many held-out bytes (or ids); 0: all."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "patience", "eval_limit"):
            _check_not_negative(name, getattr(self, name))
        if self.patience and not self.eval_every:
            raise ValueError(f"patience: {self.patience} counts evaluations, but eval_every is 0: set it")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written and shown, and when."""

    log_every: int = 50
    """Steps between lines of metrics."""
    save_every: int = 400
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, in OUT/tensorboard."""
    sample_tokens: int = 300
    """Tokens of the sample that is shown at the end; 0: none."""

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep"):
            check_count(name, getattr(self, name))
        _check_not_negative("sample_tokens", self.sample_tokens)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a training run: memory replay over long documents, its memory carried from rollout to rollout."""

    data: tuple[Path, ...] = ()
    """Files, folders: text, .jsonl, .npy or .bin arrays of ids; by default the Python standard library's sources."""
    out: Path = Path("runs/default")
    """Folder for checkpoints and metrics.jsonl."""
    steps: int = 1200
    """Optimizer steps."""
    seed: int = 0
    """Decides the initial weights, dropout, objectives and the order of documents."""
    resume: bool = False
    """Go on from the newest undamaged checkpoint in --out, with the settings saved there; --steps may be raised."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""

    documents: DocumentSettings = field(default_factory=DocumentSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        _check_not_negative("seed", self.seed)
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected less than 2**63, got {self.seed}")
        if self.model.tie_embeddings and self.compute.parallel == "fsdp":
            raise ValueError(
                "tie_embeddings: FSDP cannot share a matrix between encoder and decoder; add --no-tie-embeddings, or "
                "use --parallel ddp"
            )
        if self.compute.precision == "fp16" and self.compute.parallel == "fsdp":
            raise ValueError("precision: fp16 scales the loss, which FSDP's accumulation does not; use bf16")
        if self.rollout.replay_schedule().needs_sizes and self.compute.parallel == "fsdp":
            raise ValueError(
                "schedule: a budget measures a segment's graph, which FSDP fills with gathered weights; "
                "use every or binomial:N"
            )


def _check_not_negative(name: str, value: object, whole: bool = True) -> None:
    if not isinstance(value, (int, float)) or not value >= 0 or (whole and value != int(value)):
        raise ValueError(f"{name}: expected a {'whole ' if whole else ''}number of at least 0, got {value!r}")


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
}  # fmt: skip
"""``tiny``: two minutes on two cores. ``paper-v1``, ``paper-v2``: the shapes, slots, segments and objectives of the two
versions' language models, for a GPU; what the papers do not say (vocabulary, lanes, learning rate, steps) is ours."""


# --- Plain data in, settings out --------------------------------------------------------------------------------------


def read_yaml(file: Path, base: TrainingConfig) -> TrainingConfig:
    """``base``, changed by a YAML file.

    Raises:
        ValueError: it is not YAML, or has an unknown key (the nearest is named) or a wrong value.
        OSError: it cannot be read.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return build(TrainingConfig, {} if values is None else values, base=base)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def to_yaml(settings: TrainingConfig) -> str:
    """Every setting, so that ``--config FILE`` repeats the run."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False)


def to_plain(settings: DataclassInstance) -> dict[str, object]:
    """Settings as nested dicts of numbers, strings and lists."""
    plain: dict[str, object] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_plain(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(part) for part in value]
        plain[f.name] = value
    return plain


def to_flat(settings: DataclassInstance) -> dict[str, object]:
    """Settings by dotted names, as "model.dim"."""
    return _flat(to_plain(settings), "")


def _flat(plain: Mapping[str, object], where: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat


FORMER: dict[str, dict[str, object]] = {}
"""What a field that is newer than a saved run meant before there was one, where that is not its default today."""


def read_saved(values: Mapping[str, Any]) -> TrainingConfig:
    """The settings that a run saved; what they do not name is as it was before it could be set.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    former = {group: {**fields, **values.get(group, {})} for group, fields in FORMER.items()}
    return build(TrainingConfig, {**values, **former})


def build(cls: type[T], values: object, *, base: T | None = None, where: str = "") -> T:
    """Settings from nested dicts; what they leave out comes from ``base``, or is the default.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'settings'}: expected names with values, got {values!r}")
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in hints:
            raise ValueError(f"{path}: unknown setting{_suggestion(str(name))}")
        if dataclasses.is_dataclass(hints[name]):
            given[name] = build(hints[name], value, base=None if base is None else getattr(base, name), where=path)
        else:
            given[name] = _convert(path, hints[name], value)
    return cls(**given) if base is None else dataclasses.replace(base, **given)  # type: ignore[type-var]


def _suggestion(name: str) -> str:
    known = dict(_paths(TrainingConfig, ""))
    if name in ("recipe", "config"):
        return f": --{name} is a flag"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f". Perhaps you meant {known[close[0]]}" if close else f"; there are {', '.join(sorted(known))}"


def _paths(cls: type[DataclassInstance], where: str) -> list[tuple[str, str]]:
    found = []
    for name, hint in get_type_hints(cls).items():
        found.append((name, where + name))
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += _paths(hint, f"{name}.")
    return found


def _convert(name: str, kind: Any, value: object) -> object:
    """A value of YAML or JSON as the type of its field."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        return value
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(name, get_args(kind)[0], item) for item in items)
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (k for k in get_args(kind) if k is not type(None))
        return None if value is None else _convert(name, inner, value)
    if kind in (int, float) and not isinstance(value, bool):
        if isinstance(value, kind):
            return value
        try:
            number = float(str(value))  # YAML takes 3e-4 for a string
        except ValueError:
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number == number and number.is_integer():
            return int(number)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    raise ValueError(f"{name}: expected {expected[kind]}, got {value!r}")
