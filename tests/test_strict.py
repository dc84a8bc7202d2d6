"""Python's callers get the sentence that flags get: wrong types are refused by name, numpy's integers are integers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memformer import Memformer, MemformerConfig, MemoryState, generation, memory_replay_backprop
from memformer.config import Typed
from memformer.data import ByteTokenizer, Document, TokenIds, load_tokenizer, xz_bits_per_byte
from memformer.device import choose_device
from memformer.evaluation import evaluate
from memformer.export import export
from memformer.inspection import inspect, plot
from memformer.settings import (
    ComputeSettings,
    DocumentSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    OutputSettings,
    RolloutSettings,
    TrainingConfig,
    to_yaml,
)
from memformer.state import fingerprint
from memformer.training import Run

SETTINGS = [
    ComputeSettings,
    DocumentSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    OutputSettings,
    RolloutSettings,
    TrainingConfig,
]
SMALL = dict(
    dim=8, num_memory_slots=2, mem_update_attn_heads=2, enc_num_tokens=300, enc_depth=1, enc_heads=2,
    enc_max_seq_len=4, dec_num_tokens=300, dec_depth=1, dec_heads=2, dec_max_seq_len=5,
)  # fmt: skip


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_python_gives_settings_as_files_do() -> None:
    settings = TrainingConfig(data=["a", Path("b")], out="x", steps=np.int64(3), seed=np.uint8(2))  # type: ignore[arg-type]
    assert settings == TrainingConfig(data=(Path("a"), Path("b")), out=Path("x"), steps=3, seed=2)
    assert type(settings.steps) is int
    assert "steps: 3\n" in to_yaml(settings)
    assert TrainingConfig(data="one.txt").data == (Path("one.txt"),)  # type: ignore[arg-type]
    assert OptimizerSettings(learning_rate=np.float32(0.5)).learning_rate == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(steps=3.5), r"steps: expected a whole number, got 3\.5"),
        (lambda: TrainingConfig(steps="3"), "steps: expected a whole number, got '3'"),
        (lambda: TrainingConfig(steps=True), "steps: expected a whole number, got True"),
        (lambda: TrainingConfig(device=3), "device: expected text, got 3"),
        (lambda: TrainingConfig(out=""), "out: expected a path, got ''"),
        (lambda: TrainingConfig(out=None), "out: expected a path, got None"),
        (lambda: TrainingConfig(data=[3]), "data: expected a path, got 3"),
        (lambda: TrainingConfig(data=[""]), "data: expected a path, got ''"),
        (lambda: TrainingConfig(resume=1), "resume: expected true or false, got 1"),
        (lambda: TrainingConfig(model={"dim": 3}), r"model: expected ModelSettings\(\.\.\.\), got {'dim': 3}"),
        (lambda: ComputeSettings(precision="float16"), "precision: expected one of auto, .*, fp16, got 'float16'"),
        (lambda: ComputeSettings(precision=[]), r"precision: expected one of auto, .*, fp16, got \[\]"),
        (lambda: OptimizerSettings(learning_rate="fast"), "learning_rate: expected a number, got 'fast'"),
        (lambda: OptimizerSettings(learning_rate=float("nan")), "learning_rate: expected a finite number, got nan"),
        (lambda: RolloutSettings(schedule=None), "schedule: expected text, got None"),
        (lambda: MemformerConfig(**{**SMALL, "dim": "64"}), "dim: expected a whole number of at least 1, got '64'"),
        (lambda: MemformerConfig(**{**SMALL, "enc_heads": 2.0}), "enc_heads: expected a whole number .* got 2.0"),
        (lambda: MemformerConfig(**{**SMALL, "dim": True}), "dim: expected a whole number of at least 1, got True"),
        (lambda: MemformerConfig(**{**SMALL, "tie_embeddings": "no"}), "tie_embeddings: expected true or false"),
        (lambda: MemformerConfig(**{**SMALL, "dropout": False}), "dropout: expected a number, got False"),
    ],
)
def test_a_wrong_type_is_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("cls", [*SETTINGS, MemformerConfig])
def test_every_field_of_every_settings_class_is_checked(cls: type) -> None:
    assert issubclass(cls, Typed)
    given = SMALL if cls is MemformerConfig else {}
    for field in dataclasses.fields(cls):
        for wrong in (object(), [object()], b"x", {}):
            with pytest.raises(ValueError, match=f"{field.name}: "):
                cls(**{**given, field.name: wrong})


def test_a_model_of_numpys_integers_can_be_saved(tmp_path: Path) -> None:
    model = Memformer(**{name: np.int32(x) for name, x in SMALL.items()})
    model.save_pretrained(tmp_path)
    assert Memformer.from_pretrained(tmp_path).config == MemformerConfig(**SMALL) == model.config


# --- Token ids --------------------------------------------------------------------------------------------------------

IDS = [[3, 1, 4, 1], [5, 9, 2, 6]]
KINDS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda ids: ids,
    "uint8 array": lambda ids: np.array(ids, np.uint8),
    "uint16 array": lambda ids: np.array(ids, np.uint16),
    "big-endian array": lambda ids: np.array(ids, ">u4"),
    "read-only array": lambda ids: np.frombuffer(np.array(ids, np.uint8).tobytes(), np.uint8).reshape(2, 4),
    "uint8 tensor": lambda ids: torch.tensor(ids, dtype=torch.uint8),
    "int16 tensor": lambda ids: torch.tensor(ids, dtype=torch.int16),
    "uint16 tensor": lambda ids: torch.tensor(ids, dtype=torch.uint16),
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
}


@pytest.fixture
def model() -> Memformer:
    return Memformer(**SMALL).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind_are_the_same_ids(model: Memformer, kind: str) -> None:
    given, ids = KINDS[kind](IDS), torch.tensor(IDS)
    assert torch.equal(model(given, given).dec_out, model(ids, ids).dec_out)
    assert torch.equal(model.encode(given).mem, model.encode(ids).mem)
    encoded = model.encode(ids).enc_out
    assert torch.equal(model.decode(given, encoded, src=given), model.decode(ids, encoded, src=ids))
    for target in ([given], *([] if kind == "lists" else [given])):  # a list has one target for each segment
        assert memory_replay_backprop(model, given, target)[0] == memory_replay_backprop(model, ids, ids)[0]
    state = model.read(ids, start=256)
    assert torch.equal(model.read(given, start=np.int64(256)).memory, state.memory)
    how = dict(start=256, temperature=0)
    tokens = torch.stack(model.generate(ids, 3, **how).tokens)
    assert torch.equal(torch.stack(model.generate(given, np.int64(3), **how).tokens), tokens)
    assert torch.equal(torch.stack(list(model.stream(list(given), 3, **how)), 1), tokens)


def test_masks_may_be_arrays_too(model: Memformer) -> None:
    ids, kept = np.array(IDS, np.uint8), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = model(ids, ids, None, torch.tensor(kept).bool(), torch.tensor(kept).bool(), torch.tensor([True, False]))
    for mask in (kept, kept.tolist(), kept.astype(bool)):
        assert torch.equal(model(ids, ids, None, mask, mask, np.array([1, 0])).dec_out, expected.dec_out)


def test_what_the_tokenizer_gives_is_one_lane(model: Memformer) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("caf\u00e9")
    how = dict(start=tokenizer.start, never=np.array(tokenizer.special), stop=np.array([7]), temperature=0)
    whole = torch.tensor([list("caf\u00e9".encode())])
    expected = model.generate(whole, 5, **{**how, "never": tokenizer.special, "stop": [7]})
    for given in (ids, ids.tolist(), torch.from_numpy(ids.copy()), [ids], [ids.tolist()]):
        found = model.generate(given, 5, **how)
        assert torch.equal(found.tokens[0], expected.tokens[0])
    assert model.read(tokenizer.encode(""), start=256).batch_size == 1


@pytest.mark.parametrize(
    "wrong",
    [np.array(IDS, float), torch.tensor(IDS).float(), torch.tensor(IDS) > 2, [[True, False]], [[0.5, 1.5]], [[-1, 2]],
     [[2**70, 1]], "text", b"text", 3, [["a"]], [[1, 2], [None]], np.int64(3), {"a": 1}],
    ids=str,
)  # fmt: skip
def test_what_are_no_ids_is_refused(model: Memformer, wrong: Any) -> None:
    with pytest.raises(ValueError, match="src: "):
        model(wrong)
    with pytest.raises(ValueError, match="src: "):
        memory_replay_backprop(model, wrong, torch.tensor(IDS))
    for use in (model.read, lambda ids, start: model.generate(ids, 2, start=start)):
        with pytest.raises(ValueError, match="tokens: "):
            use(wrong, start=256)


def test_lanes_of_a_state_are_named_by_integers_or_booleans(model: Memformer) -> None:
    state = model.read([[1, 2, 3], [4, 5, 6], [7, 8, 9]], start=256)
    for lanes in ([2, 0], np.array([2, 0], np.uint8), torch.tensor([2, 0], dtype=torch.int16), [np.int64(2), 0]):
        assert torch.equal(state.select(lanes).pending, state.pending[[2, 0]])
        assert torch.equal(state.reset(lanes).position, torch.tensor([0, 3, 0]))
    for chosen in ([True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])):
        assert torch.equal(state.select(chosen).pending, state.pending[[0, 2]])
    assert torch.equal(state.reorder(np.array([2, 1, 1])).pending, state.pending[[2, 1, 1]])
    assert [part.batch_size for part in state.split(np.int64(2))] == [2, 1]
    for wrong in ([0.5], "a", None, [3], [-1], [[0]], [True]):
        with pytest.raises(ValueError, match="lanes: expected indices from 0 to 2"):
            state.select(wrong)
    for wrong in (0, -1, 3.5, True, [1, 1], "a", None):
        with pytest.raises(ValueError, match="split: expected"):
            state.split(wrong)


# --- Models that are wrapped, compiled or quantised -------------------------------------------------------------------


def wrappers() -> dict[str, Callable[[Memformer], nn.Module]]:
    def inside(model: Memformer) -> nn.Module:
        model = copy.deepcopy(model)
        model.encoder = torch.compile(model.encoder, backend="eager")
        return model

    return {
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "compiled inside": inside,
        "data parallel": nn.DataParallel,
        "averaged": torch.optim.swa_utils.AveragedModel,
        "twice": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    }


@pytest.mark.parametrize("wrapper", wrappers())
def test_a_wrapped_model_is_the_one_inside(model: Memformer, tmp_path: Path, wrapper: str) -> None:
    wrapped = wrappers()[wrapper](model)
    assert fingerprint(wrapped) == fingerprint(model)
    state = model.read(IDS, start=256)
    state.save(tmp_path / "by-model", model)
    state.save(tmp_path / "by-wrapped", wrapped)
    for file in ("by-model", "by-wrapped"):
        assert torch.equal(MemoryState.load(tmp_path / file, model).pending, state.pending)
    assert torch.equal(MemoryState.load(tmp_path / "by-model", wrapped).memory, state.memory)
    assert torch.equal(generation.read(wrapped, IDS, start=256).memory, state.memory)
    found, expected = (generation.generate(m, IDS, 5, start=256, temperature=0) for m in (wrapped, model))
    assert torch.equal(torch.stack(found.tokens), torch.stack(expected.tokens))


def test_a_model_with_a_compiled_part_is_saved_under_its_own_names(model: Memformer, tmp_path: Path) -> None:
    wrappers()["compiled inside"](model).save_pretrained(tmp_path / "compiled")
    model.save_pretrained(tmp_path / "plain")
    files = [tmp_path / name / "model.safetensors" for name in ("compiled", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_generates_evaluates_and_has_states(model: Memformer, tmp_path: Path) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no int8 here")
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert fingerprint(small) == fingerprint(copy.deepcopy(small)) != fingerprint(model)
    _, state = small.generate(IDS, 5, start=256, temperature=0)
    state.save(tmp_path / "talk", small)
    assert torch.equal(MemoryState.load(tmp_path / "talk", small).memory, state.memory)
    with pytest.raises(ValueError, match="written with another model"):
        MemoryState.load(tmp_path / "talk", model)
    with pytest.raises(ValueError, match="save_pretrained: this model is quantised"):
        small.save_pretrained(tmp_path / "model")
    tokenizer, documents = ByteTokenizer(), [Document("a", b"to read is to remember " * 3)]
    model = Memformer(**{**SMALL, "enc_num_tokens": tokenizer.vocabulary, "dec_num_tokens": tokenizer.vocabulary})
    small = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
    whole, part = (evaluate(m, documents, tokenizer).bits_per_byte for m in (model, small))
    assert part == pytest.approx(whole, rel=0.05)


def test_a_memory_that_is_not_finite_is_not_saved(model: Memformer, tmp_path: Path) -> None:
    state = model.read(IDS, start=256)
    state.memory[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="memory: holds numbers that are not finite"):
        state.save(tmp_path / "talk", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", None, 3, [], b"x"])
def test_a_path_is_a_path(model: Memformer, path: Any) -> None:
    state = model.read(IDS, start=256)
    for use in (lambda: state.save(path, model), lambda: MemoryState.load(path, model)):
        with pytest.raises(ValueError, match="path: expected a path"):
            use()
    for use in (lambda: model.save_pretrained(path), lambda: Memformer.from_pretrained(path)):
        with pytest.raises(ValueError, match="folder: expected a path"):
            use()


# --- Every argument of every public function --------------------------------------------------------------------------

WRONG: list[Any] = [None, "", -1, 0, 3.5, True, np.int64(3), []]


def calls(folder: Path) -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Public functions, each with arguments that are right."""
    model, ids = Memformer(**SMALL).eval(), torch.tensor(IDS)
    state = model.read(ids, start=256)
    state.save(folder / "state", model)
    model.save_pretrained(folder / "model")
    ByteTokenizer().save(folder)
    logits, seen, encoded = torch.randn(2, 300), ids, model.encode(ids).enc_out
    documents = [Document("a", b"to read is to remember " * 3), Document("b", b"and to write")]
    bytes_model = Memformer(**{**SMALL, "enc_num_tokens": 260, "dec_num_tokens": 260})
    found = inspect(model, [np.arange(40)], start=256, segments=3)
    read = dict(tokens=ids, state=None, start=256, mask=None)
    write = dict(prompt=ids, max_new_tokens=2, start=256, prompt_mask=None, state=None, sampling=None, generator=None)
    write |= dict(capture="auto")
    filters = dict(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, stop=(), never=())
    return {
        "Memformer": (Memformer, SMALL),
        "forward": (model, dict(src=ids, tgt=ids, mems=None, src_mask=None, tgt_mask=None, reset=None)),
        "encode": (model.encode, dict(src=ids, mems=None, src_mask=None, reset=None)),
        "decode": (model.decode, dict(tgt=ids, enc_out=encoded, src_mask=None, tgt_mask=None, src=ids)),
        "resize_memory": (copy.deepcopy(model).resize_memory, dict(num_memory_slots=3)),
        "resize_mems": (model.resize_mems, dict(mems=model.get_initial_mem(2))),
        "save_pretrained": (model.save_pretrained, dict(folder=folder / "model")),
        "from_pretrained": (Memformer.from_pretrained, dict(folder=folder / "model")),
        "memory_replay_backprop": (
            functools.partial(memory_replay_backprop, model),
            dict(src=ids, tgt=ids, src_mask=None, tgt_mask=None, reset=None, mems=None),
        ),
        "read": (generation.read, dict(model=model, **read)),
        "stream": (generation.stream, dict(model=model, **write)),
        "generate": (generation.generate, dict(model=model, **write, beams=None)),
        "beams": (generation.generate, dict(model=model, **write, beams=2, length_penalty=1.0)),
        "Sampling": (generation.Sampling, filters),
        "sampled": (functools.partial(model.generate, ids, 2, start=256), filters),
        "keep_top_k": (functools.partial(generation.keep_top_k, logits), dict(k=3)),
        "keep_top_p": (functools.partial(generation.keep_top_p, logits), dict(p=0.5)),
        "keep_min_p": (functools.partial(generation.keep_min_p, logits), dict(p=0.5)),
        "penalise_repetition": (functools.partial(generation.penalise_repetition, logits, seen), dict(penalty=1.1)),
        "state.save": (state.save, dict(path=folder / "state", model=model)),
        "state.load": (MemoryState.load, dict(path=folder / "state", model=model)),
        "state.select": (state.select, dict(lanes=[0])),
        "state.reset": (state.reset, dict(lanes=[0])),
        "state.reorder": (state.reorder, dict(parents=[0, 0])),
        "state.cat": (MemoryState.cat, dict(states=[state])),
        "state.split": (state.split, dict(sizes=1)),
        "state.pad_to": (state.pad_to, dict(batch_size=3)),
        "fingerprint": (fingerprint, dict(model=model)),
        "evaluate": (evaluate, dict(model=bytes_model, documents=documents, tokenizer=ByteTokenizer(), lanes=2)),
        "load_tokenizer": (load_tokenizer, dict(folder=folder)),
        "TokenIds": (TokenIds, dict(size=3)),
        "xz": (xz_bits_per_byte, dict(held_out=[b"abc"], most=None)),
        "inspect": (inspect, dict(model=model, documents=[np.arange(40)], start=256, segments=3)),
        "plot": (functools.partial(plot, found), dict(path=folder / "plot.png")),
        "export": (functools.partial(export, model), dict(folder=folder / "exported", format="torch")),
        "choose_device": (choose_device, dict(name="cpu")),
        "Run": (Run, dict(settings=TrainingConfig(data=(folder / "nothing",)))),
    }  # fmt: skip


NAMES = [
    *("Memformer", "forward", "encode", "decode", "resize_memory", "resize_mems", "save_pretrained"),
    *("from_pretrained", "memory_replay_backprop", "read", "stream", "generate", "beams", "Sampling", "sampled"),
    *("keep_top_k", "keep_top_p", "keep_min_p", "penalise_repetition", "state.save", "state.load", "state.select"),
    *("state.reset", "state.reorder", "state.cat", "state.split", "state.pad_to", "fingerprint", "evaluate"),
    *("load_tokenizer", "TokenIds", "xz", "inspect", "plot", "export", "choose_device", "Run"),
]
"""Not among them: filters' logits (pure functions of tensors), tasks, corpora, lanes and objectives."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever an argument is, it is taken or refused: no error from inside."""
    monkeypatch.chdir(tmp_path)
    function, right = calls(tmp_path)[name]
    inside = []
    for argument in right:
        for wrong in WRONG:
            try:
                function(**{**right, argument: wrong})
            except (ValueError, OSError):
                pass
            except Exception as error:
                inside.append(f"{argument}={wrong!r}: {error!r}")
    assert inside == []
