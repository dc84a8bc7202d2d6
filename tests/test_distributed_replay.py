"""Two processes (gloo): what a training step does under DistributedDataParallel and under FSDP2 equals one process."""

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memformer import CausalMemformer, Memformer, replay
from memformer.data.segments import Segment, cut
from memformer.interface import SegmentModel
from memformer.parallel import shard
from memformer.pretrained import full
from memformer.rollouts import rollout
from memformer.training.parts import RolloutLoss
from processes import WORLD, two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

BATCH, SEGMENTS, LENGTH = 4, 4, 3


class Cell(nn.Module):
    """Its initial memory is learned and used in the first segment alone: the case that trips synchronisation."""

    def __init__(self):
        super().__init__()
        self.initial = nn.Parameter(torch.randn(8))
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, segment: Tensor, memory: Tensor | None):
        if memory is None:
            memory = self.initial.expand(1, segment.shape[0], 8).contiguous()
        return self.rnn(segment, memory)


class TouchingCell(Cell):
    """FSDP reduces gradients of one dtype at a time: with bfloat16 parameters and a float32 reduction, one that is used
    in a single segment would stay in bfloat16 beside the others' float32 sums. So it is used in each."""

    def forward(self, segment: Tensor, memory: Tensor | None):
        return super().forward(segment, None if memory is None else memory + 0 * self.initial)


class Trained(nn.Module):
    """The module that is wrapped: its forward calls the replay."""

    def __init__(self, method: Callable = replay.memory_replay, cell: type[Cell] = Cell):
        super().__init__()
        self.cell, self.head, self.method = cell(), nn.Linear(8, 8), method

    def forward(self, segments: list[Tensor]) -> Tensor:
        return self.method(self.cell, segments, None, self.read_out, readout_segments=2).loss / len(segments)

    def read_out(self, values: list[Tensor], segments: list[Tensor]) -> Tensor:
        return sum((self.head(v) - s).square().mean() for v, s in zip(values, segments, strict=True))


def data() -> Tensor:
    return torch.randn(BATCH, SEGMENTS * LENGTH, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


# --- DistributedDataParallel, unmodified


def ddp_step(rank: int) -> dict[str, list]:
    torch.manual_seed(0)
    model = Trained(functools.partial(replay.memory_replay, schedule=replay.Binomial(2)))
    mine = data()[rank::WORLD]
    wrapped = DistributedDataParallel(model)
    wrapped(mine.split(LENGTH, 1)).backward()
    single = gradients(model)

    model.zero_grad()
    with wrapped.no_sync():  # accumulation: two halves of the rollouts, one synchronisation
        wrapped(mine[:1].split(LENGTH, 1)).backward()
    wrapped(mine[1:].split(LENGTH, 1)).backward()
    accumulated = gradients(model)

    model.zero_grad()  # ranks whose rollouts differ in length
    wrapped(mine.split(LENGTH, 1)[: 2 + rank]).backward()
    return {"single": single, "accumulated": accumulated, "unequal": gradients(model)}


def test_ddp_equals_one_process_and_ranks_agree(tmp_path):
    first, second = two_processes(ddp_step, tmp_path)
    for key in first:
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True)), key

    torch.manual_seed(0)
    model = Trained(replay.full_bptt)
    model(data().split(LENGTH, 1)).backward()
    whole = gradients(model)
    assert_all_close(first["single"], whole, 1e-6)
    assert_all_close(first["accumulated"], [2 * g for g in whole], 1e-6)

    model.zero_grad()
    for rank in range(WORLD):
        (model(data()[rank::WORLD].split(LENGTH, 1)[: 2 + rank]) / WORLD).backward()
    assert_all_close(first["unequal"], gradients(model), 1e-6)


# --- FSDP2, by replay.accumulate


SCHEDULES = {
    "every": replay.EveryMemory(),
    "no graphs": replay.EveryMemory(graphs=0),
    "two graphs": replay.EveryMemory(graphs=2),
    "all graphs": replay.EveryMemory(graphs=9),
    "binomial": replay.Binomial(1),
    "binomial, two graphs": replay.Binomial(2, graphs=2),
}


def fsdp_step(rank: int) -> dict[str, list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (WORLD,))
    segments = data()[rank::WORLD].split(LENGTH, 1)

    def sharded(cell: type[Cell] = Cell, **options) -> tuple[Trained, nn.ModuleList, Callable]:
        torch.manual_seed(0)
        model = Trained(cell=cell)
        parts = nn.ModuleList([model.cell, model.head])
        for part in parts:
            fully_shard(part, mesh=mesh, **options)

        def sync(last: bool) -> None:
            for part in parts:
                part.set_requires_gradient_sync(last)

        return model, parts, sync

    def step(model, parts, sync, **options) -> tuple[list[Tensor], Tensor]:
        parts.zero_grad()
        rollout = replay.accumulate(
            model.cell, segments, None, model.read_out, readout_segments=2, sync=sync, check=True, **options
        )
        return [p.grad.full_tensor() for p in parts.parameters()], rollout.loss

    results = {}
    model, parts, sync = sharded()
    for name, schedule in SCHEDULES.items():
        results[name], loss = step(model, parts, sync, schedule=schedule)
        results[f"{name} loss"] = [loss]
    watch = replay.MemoryGradients(max_norm=1e-2)
    results["clipped"], _ = step(model, parts, sync, memory_gradients=watch)
    results["norms"] = [torch.tensor(watch.norms)]
    with pytest.raises(ValueError, match=r"sharded by FSDP.*replay\.accumulate"):
        replay.memory_replay(model.cell, segments, None, model.read_out)
    with pytest.raises(ValueError, match=r"number of segments differs between ranks.*\[2, 3\]"):
        replay.accumulate(model.cell, segments[: 2 + rank], None, model.read_out, sync=sync)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = sharded(TouchingCell, mp_policy=policy)
    for name in ("every", "binomial, two graphs"):
        results[f"bfloat16, {name}"], _ = step(*half, schedule=SCHEDULES[name])
        assert all(g.dtype == torch.float32 for g in results[f"bfloat16, {name}"])
    return results


def test_fsdp2_equals_one_process_and_ranks_agree(tmp_path):
    first, second = two_processes(fsdp_step, tmp_path)
    torch.manual_seed(0)
    model = Trained(replay.full_bptt)
    loss = model(data().split(LENGTH, 1)) * SEGMENTS
    loss.backward()
    whole = gradients(model)
    for key in (*SCHEDULES, "bfloat16, every", "bfloat16, binomial, two graphs"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True)), key
    for key in SCHEDULES:
        assert_all_close(first[key], whole, 1e-6)
        mean = (first[f"{key} loss"][0] + second[f"{key} loss"][0]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-6, atol=1e-6)
    for key in ("bfloat16, every", "bfloat16, binomial, two graphs"):
        for actual, expected in zip(first[key], whole, strict=True):
            assert (actual - expected).norm() < 2e-2 * expected.norm(), key

    model.zero_grad()
    for rank, result in enumerate((first, second)):  # clipping is of each rank's own rollouts
        watch = replay.MemoryGradients(max_norm=1e-2)
        mine = data()[rank::WORLD].split(LENGTH, 1)
        rollout = replay.full_bptt(model.cell, mine, None, model.read_out, memory_gradients=watch)
        rollout.loss.backward()
        torch.testing.assert_close(result["norms"][0][1:], torch.tensor(watch.norms)[1:], rtol=1e-4, atol=1e-6)
    assert_all_close(first["clipped"], [g / WORLD for g in gradients(model)], 1e-6)


# --- The library's models, as training wraps them

CAUSAL = dict(dim=16, num_memory_slots=2, num_tokens=11, max_seq_len=4, heads=2, mem_update_attn_heads=2, depth=3)
MODELS: dict[str, Callable[..., SegmentModel]] = {
    "memformer": lambda tied: Memformer(
        dim=16, num_memory_slots=2, enc_num_tokens=11, enc_max_seq_len=4, enc_depth=1, enc_heads=2, dec_num_tokens=11,
        dec_max_seq_len=4, dec_depth=1, dec_heads=2, mem_update_attn_heads=2, tie_embeddings=tied,
    ),
    "causal": lambda tied: CausalMemformer(**CAUSAL, tie_embeddings=tied),
    "causal, one memory": lambda tied: CausalMemformer(**CAUSAL, tie_embeddings=tied, memory="one"),
}  # fmt: skip


def made(kind: str, tied: bool) -> SegmentModel:
    torch.manual_seed(0)
    return MODELS[kind](tied).double()


def rows(kind: str, rank: int = 0, world: int = 1) -> list[Segment]:
    """A rank's lanes, with masks, and in the third segment new documents."""
    draw = torch.Generator().manual_seed(2)
    src, mask = torch.randint(0, 11, (BATCH, 16), generator=draw), torch.rand(BATCH, 16, generator=draw) > 0.2
    tgt = list(torch.randint(0, 11, (4, BATCH, 4), generator=draw)[:, rank::world]) if kind == "memformer" else None
    reset = [None, None, torch.tensor([True, False, False, True])[rank::world], None]
    return cut(4, src[rank::world], tgt, mask[rank::world], None, reset)


def model_steps(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for kind in MODELS:
        for parallel in ("ddp", "fsdp"):
            model = made(kind, tied=parallel == "ddp")
            if parallel == "fsdp":
                shard(model, torch.device("cpu"))
                model.get_initial_mem(1)  # whatever is asked for first
                if kind == "causal":
                    with pytest.raises(ValueError, match="wavefront: FSDP divides this model"):
                        rollout(model, rows(kind), wavefront=True)
            rollouts: nn.Module = RolloutLoss(model, replay.Options())
            wrapped = DistributedDataParallel(rollouts) if parallel == "ddp" else rollouts
            loss, _ = wrapped(rows(kind, rank, WORLD), None, 1.0, True, None)
            if loss.requires_grad:
                loss.backward()
            found[f"{kind} {parallel}"] = [full(p.grad) for p in model.parameters()]
    return found


def test_gradients_of_the_models(tmp_path):
    """Two processes, whichever order the layers of a causal model have, against plain autograd in one."""
    first, second = two_processes(model_steps, tmp_path)
    for kind in MODELS:
        for parallel in ("ddp", "fsdp"):
            key = f"{kind} {parallel}"
            assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True)), key
            model = made(kind, tied=parallel == "ddp")
            rollout(model, rows(kind), divisor=WORLD, wavefront=False, method=replay.full_bptt).loss.backward()
            assert_all_close(first[key], gradients(model), 1e-10)


# --- Ranks of different lengths


def compare_lengths(rank: int) -> str:
    replay.check_equal_across_ranks(5, "the number of segments")
    try:
        replay.check_equal_across_ranks(5 + rank, "the number of segments")
    except ValueError as error:
        return [str(error)]
    return ["no error"]


def test_different_numbers_of_segments_are_refused_on_every_rank(tmp_path):
    expected = "the number of segments differs between ranks, which would wait for each other for ever: [5, 6]"
    assert two_processes(compare_lengths, tmp_path) == [[expected]] * 2


def test_without_processes_there_is_nothing_to_compare():
    replay.check_equal_across_ranks(5, "the number of segments")
