"""Settings: read from YAML, refused with a suggestion, written so that they repeat the run."""

import dataclasses
import json
import math

import pytest

from memformer import replay
from memformer.settings import (
    RECIPES,
    ComputeSettings,
    DocumentSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    OutputSettings,
    RolloutSettings,
    TrainingConfig,
    absolute,
    build,
    read_saved,
    read_yaml,
    to_plain,
    to_yaml,
)

UNTIED = ModelSettings(tie_embeddings=False)


@pytest.mark.parametrize(
    "given_", [dict(include=("*.txt",)), dict(exclude=("a",)), dict(separator=3), dict(text_field="body")]
)
def test_how_files_are_read_needs_files(given_):
    with pytest.raises(ValueError, match=rf"{next(iter(given_))}: Python's own sources, .* give --data"):
        TrainingConfig(documents=DocumentSettings(**given_))
    assert TrainingConfig(data=("texts",), documents=DocumentSettings(**given_))


def test_the_path_of_a_tokenizer_is_found_from_any_folder_as_data_is(tmp_path, monkeypatch):
    """Else a run is refused its own tokenizer, under another spelling of the path."""
    monkeypatch.chdir(tmp_path)
    for given, kept in [("t/tokenizer.json", str(tmp_path / "t/tokenizer.json")), ("bpe", "bpe"), ("ids", "ids")]:
        assert absolute(TrainingConfig(documents=DocumentSettings(tokenizer=given))).documents.tokenizer == kept


def test_what_is_written_is_what_is_read(tmp_path):
    for name, recipe in RECIPES.items():
        settings = dataclasses.replace(recipe, data=(tmp_path / "a", tmp_path / "b"), seed=7)
        (tmp_path / name).write_text(to_yaml(settings))
        assert read_yaml(tmp_path / name, TrainingConfig()) == settings
        assert build(TrainingConfig, to_plain(settings)) == settings


def test_a_file_says_only_what_differs(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 10\noptimizer:\n  learning_rate: 3e-4\nmodel: {dim: 32}\ndata: one.txt\n")
    base = TrainingConfig(seed=3, model=ModelSettings(slots=5))
    assert build(TrainingConfig, {"seed": 2**53 + 1}).seed == 2**53 + 1
    settings = read_yaml(file, base)
    assert (settings.steps, settings.optimizer.learning_rate, settings.seed) == (10, 3e-4, 3)
    assert settings.model == ModelSettings(slots=5, dim=32)
    assert [str(path) for path in settings.data] == ["one.txt"]
    file.write_text("")
    assert read_yaml(file, base) == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"stepz: unknown setting\. Perhaps you meant steps"),
        ("dim: 3", r"dim: unknown setting\. Perhaps you meant model\.dim"),
        ("model: {dimm: 3}", r"model\.dimm: unknown setting\. Perhaps you meant model\.dim"),
        ("qqqqqq: 3", "qqqqqq: unknown setting; there are .*steps"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("steps: 1.5", r"steps: expected a whole number, got 1\.5"),
        ("steps: true", "steps: expected a whole number, got True"),
        ("steps: 0", "steps: expected a whole number of at least 1, got 0"),
        ("resume: 1", "resume: expected true or false, got 1"),
        ("model: 3", "model: expected names with values, got 3"),
        ("model: {dmi: 16}", r"dmi: unknown setting.* Perhaps you meant model\.dim$"),
        ("- 3", "expected names with values"),
        ("data: 3", "data: expected a list, got 3"),
        ("model: {positions: rotatory}", "positions: expected one of rotary, relative, bucketed, got 'rotatory'"),
        ("optimizer: {learning_rate: fast}", "learning_rate: expected a number, got 'fast'"),
        ("steps: [", "not YAML"),
        ("optimizer: {warmup: 1}\nsteps: 3\noptimizer: {eps: 1}", r"not YAML \('optimizer' stands twice in .*, line 3"),
        ("optimizer: {warmup: 1, warmup: 2}", r"not YAML \('warmup' stands twice"),
        ("a: " + "[" * 20000, "not YAML"),
        ("recipe: paper-v1", "recipe: unknown setting: --recipe is a flag"),
        ("seed: 9223372036854775808", r"seed: expected less than 2\*\*63"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(file, TrainingConfig())
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(steps=0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: TrainingConfig(seed=-1), "seed: expected a whole number of at least 0, got -1"),
        (lambda: ModelSettings(dim=0), "dim: expected a whole number of at least 1"),
        (lambda: DocumentSettings(held_out=1), "held_out: expected a whole number of at least 2, got 1"),
        (lambda: DocumentSettings(separator=-1), "separator: expected a whole number of at least 0"),
        (lambda: ObjectiveSettings(continuation=-1.0), "continuation: expected a number of at least 0"),
        (lambda: ObjectiveSettings(continuation=0), "expected one of the odds above 0"),
        (lambda: RolloutSettings(horizon=2, horizon_start=3), "horizon_start: expected at most the horizon 2, got 3"),
        (lambda: RolloutSettings(readout_tokens=0), "readout_tokens: expected a whole number of at least 1, got 0"),
        (lambda: RolloutSettings(readout_tokens=9, horizon=1), "readout_tokens: has no meaning with a horizon of 1"),
        (lambda: RolloutSettings(graphs=-1), "graphs: expected a whole number of at least 0, got -1"),
        *(
            (
                lambda wrong=wrong: RolloutSettings(schedule=wrong),
                rf"schedule: expected every, binomial:N .* or budget:SIZE .* KB, .* GiB, .*, got '{wrong}'$",
            )
            for wrong in [
                "",
                "all",
                "every:4",
                "binomial",
                "binomial:0",
                "binomial:1.5",
                "budget:",
                "budget:2",
                "budget:0GB",
            ]
        ),
        (
            lambda: RolloutSettings(schedule="budget:1GB", graphs=2),
            "graphs: a budget chooses how many are kept; leave it out, got 2",
        ),
        (lambda: OptimizerSettings(warmup=-1), "warmup: expected a whole number of at least 0, got -1"),
        (lambda: OptimizerSettings(learning_rate=0.0), "learning_rate: expected a finite number above 0, got 0"),
        (lambda: OptimizerSettings(clip=-1.0), "clip: expected a number of at least 0"),
        (lambda: OptimizerSettings(clip=math.nan), "clip: expected a finite number, got nan"),
        (lambda: OptimizerSettings(learning_rate=math.inf), "learning_rate: expected a finite number, got inf"),
        (lambda: OptimizerSettings(weight_decay=math.inf), "weight_decay: expected a finite number, got inf"),
        (lambda: OptimizerSettings(eps=0.0), "eps: expected a finite number above 0, got 0"),
        *(
            (lambda n=n, v=v: OptimizerSettings(**{n: v}), rf"{n}: expected a decay in \[0, 1\), got {v}")
            for n, v in [("ema", 1.0), ("beta1", 1.0), ("beta2", 1.5), ("beta1", -0.1)]
        ),
        (lambda: OptimizerSettings(skip_non_finite=-1), "skip_non_finite: expected a whole number of at least 0"),
        (lambda: OptimizerSettings(skip_non_finite=1.5), "skip_non_finite: expected a whole number, got 1.5"),
        (
            lambda: OptimizerSettings(learning_rate_schedule="cosin"),
            "learning_rate_schedule: expected one of cosine, wsd, constant, got 'cosin'",
        ),
        (lambda: OptimizerSettings(optimizer="sgd"), "optimizer: expected one of adamw, muon, got 'sgd'"),
        (lambda: OptimizerSettings(decay_of="all"), "decay_of: expected one of linear, matrices, got 'all'"),
        (
            lambda: OptimizerSettings(learning_rate_schedule="wsd", decay_share=0.0),
            r"decay_share: expected a share of the steps in \(0, 1\], got 0",
        ),
        (
            lambda: OptimizerSettings(decay_share=0.5),
            "decay_share: 0.5 is for learning_rate_schedule wsd, got cosine",
        ),
        (lambda: OptimizerSettings(least=1.5), r"least: expected a share of the learning rate in \[0, 1\], got 1.5"),
        (
            lambda: OptimizerSettings(learning_rate_schedule="constant", least=0.1),
            "least: 0.1 is where the learning rate falls to, but constant does not fall",
        ),
        (lambda: EvaluationSettings(patience=2), "patience: 2 counts evaluations, but eval_every is 0"),
        (lambda: OutputSettings(keep=0), "keep: expected a whole number of at least 1"),
        (
            lambda: TrainingConfig(compute=ComputeSettings(parallel="fsdp")),
            "tie_embeddings: FSDP cannot share",
        ),
        (
            lambda: TrainingConfig(model=UNTIED, compute=ComputeSettings(precision="fp16", parallel="fsdp")),
            "precision: fp16",
        ),
        (
            lambda: TrainingConfig(
                model=UNTIED, compute=ComputeSettings(parallel="fsdp"), rollout=RolloutSettings(schedule="budget:2GB")
            ),
            "schedule: a budget measures .* use every or binomial:N",
        ),
    ],
)
def test_settings_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_horizon_grows_along_a_line():
    shape = RolloutSettings(horizon=8, horizon_start=2, horizon_steps=6)
    assert [shape.horizon_at(step) for step in range(8)] == [2, 3, 4, 5, 6, 7, 8, 8]
    assert RolloutSettings(horizon=8).horizon_at(0) == 8


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        (dict(), replay.EveryMemory()),
        (dict(graphs=3), replay.EveryMemory(3)),
        (dict(schedule="binomial:16"), replay.Binomial(16)),
        (dict(schedule="binomial:16", graphs=0), replay.Binomial(16, 0)),
        (dict(schedule="budget:2GB"), replay.Budget(2 * 10**9)),
        (dict(schedule="budget:1.5 mib"), replay.Budget(3 * 2**19)),
        (dict(schedule="budget:12B", offload="cpu"), replay.Offload(replay.Budget(12))),
        (dict(offload="memories"), replay.Offload(replay.EveryMemory(), "memories")),
    ],
)
def test_every_schedule_has_a_spelling(settings, schedule):
    assert RolloutSettings(**settings).replay_schedule() == schedule
    assert build(RolloutSettings, to_plain(RolloutSettings(**settings))) == RolloutSettings(**settings)


def test_every_setting_of_the_model_reaches_it():
    changes = {
        "dim": 128, "slots": 3, "enc_depth": 3, "dec_depth": 3, "dec_overlap": 3, "heads": 2, "mem_updates": 2,
        "memory_writer": "gated", "write_temperature": 0.5, "forgetting": 0.0, "slot_parts": 2, "write_heads": 2,
        "positions": "relative", "dropout": 0.1, "tie_embeddings": False,
    }  # fmt: skip
    causal = {"architecture": "causal", "depth": 4, "overlap": 3, "memory_layout": "one"}
    assert set(changes) | set(causal) == {field.name for field in dataclasses.fields(ModelSettings)}
    usual = ModelSettings().config(300, 32)
    for name, value in changes.items():
        assert dataclasses.replace(ModelSettings(), **{name: value}).config(300, 32) != usual, name
    stack = ModelSettings(architecture="causal")
    shared = {name: changes[name] for name in changes.keys() - {"enc_depth", "dec_depth", "dec_overlap"}}
    for name, value in (shared | {**causal, "tie_embeddings": False, "architecture": "memformer"}).items():
        assert dataclasses.replace(stack, **{name: value}).config(300, 32) != stack.config(300, 32), name


def test_parts_of_slots_are_written_by_as_many_heads_if_no_number_is_given():
    for architecture in ("memformer", "causal"):
        config = ModelSettings(architecture=architecture, heads=4, slot_parts=8).config(300, 32)
        assert (config.slot_parts, config.mem_update_attn_heads) == (8, 8)
        assert ModelSettings(architecture=architecture, heads=4).config(300, 32).mem_update_attn_heads == 4
        config = ModelSettings(architecture=architecture, slot_parts=2, write_heads=8).config(300, 32)
        assert (config.slot_parts, config.mem_update_attn_heads) == (2, 8)
        with pytest.raises(ValueError, match=r"^write_heads: must divide dim"):
            ModelSettings(architecture=architecture, write_heads=3).config(300, 32)
        with pytest.raises(ValueError, match="slot_parts: must divide dim, got 7 parts for dim 64"):
            ModelSettings(architecture=architecture, slot_parts=7).config(300, 32)


@pytest.mark.parametrize("architecture", ["memformer", "causal"])
def test_settings_of_a_model_are_those_it_was_made_of(architecture):
    for changes in ({}, {"slot_parts": 8}, {"write_heads": 2}, {"slot_parts": 2, "write_heads": 8}, {"forgetting": 0}):
        settings = ModelSettings(architecture=architecture, **changes)
        assert ModelSettings.of(settings.config(300, 32), 0.0) == settings
        explicit = dataclasses.replace(settings, write_heads=settings.writing_heads(settings.heads))
        assert ModelSettings.of(explicit.config(300, 32), 0.0) == settings, "what is usual is left to be so"


@pytest.mark.parametrize(
    ("parts", "heads", "now"),
    [(None, 8, 0), (1, 8, 0), (1, 4, 4), (8, 8, 0), (4, 4, 0), (4, 8, 8)],
)
def test_writing_heads_around_a_base_were_said_elsewhere(tmp_path, parts, heads, now):
    model = {} if parts is None else {"slot_parts": parts}
    older = {"model": model, "around": {"base": "somewhere", "write_heads": heads, "read_dim": 8}}
    (tmp_path / "older.yaml").write_text(json.dumps(older))
    for read in (read_saved(older), read_yaml(tmp_path / "older.yaml", TrainingConfig())):
        assert read.model.write_heads == now
        assert read.model.writing_heads(8) == heads
        assert read.around.read_dim == 8
    assert read_saved({"around": {"base": None, "write_heads": 8}}) == read_saved({})
    with pytest.raises(ValueError, match=r"around\.write_heads: unknown setting.*model\.write_heads"):
        read_saved({"around": {"write_heads": 4}})
    with pytest.raises(ValueError, match="model: expected names with values, got 3"):
        read_saved({"model": 3, "around": {"write_heads": 4}})


def test_what_is_of_the_other_architecture_is_refused():
    with pytest.raises(ValueError, match=r"depth: 4 has no meaning with the architecture memformer, which has"):
        ModelSettings(depth=4)
    with pytest.raises(ValueError, match=r"dec_depth: 3 has no meaning with the architecture causal, which has depth"):
        ModelSettings(architecture="causal", dec_depth=3)
    causal = ModelSettings(architecture="causal")
    for changes, message in (
        ({"objective": ObjectiveSettings(recall=0.5)}, "recall: a causal model predicts what it reads"),
        ({"compute": ComputeSettings(parallel="fsdp")}, "tie_embeddings: FSDP cannot share"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingConfig(model=causal, **changes)


def test_recipes_make_models():
    for recipe in RECIPES.values():
        config = recipe.model.config(300, recipe.rollout.segment_length)
        assert config.segment_length == recipe.rollout.segment_length
    assert RECIPES["tiny"] == TrainingConfig()
    paper = RECIPES["paper-v1"]
    assert (paper.model.enc_depth, paper.model.dec_depth, paper.model.dim, paper.model.slots) == (4, 8, 512, 32)
    assert dataclasses.astuple(paper.objective) == (0.6, 0.3, 0.1)
    assert {name for name, recipe in RECIPES.items() if recipe.model.architecture == "causal"} == {
        "causal",
        "causal-tiny",
    }
