"""Two processes under an unmodified DistributedDataParallel: wrap the module whose forward calls the replay.

Run: python examples/replay_ddp.py
"""

import gc
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memformer import replay


class Trained(nn.Module):
    """What is wrapped. Its loss is an ordinary loss, and each parameter's gradient leaves the replay once."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, sequence: Tensor) -> Tensor:
        state = torch.zeros(1, sequence.shape[0], 16)
        return replay.memory_replay(self.rnn, sequence.split(10, 1), state, self.read_out).loss

    def read_out(self, values: list[Tensor], segments: list[Tensor]) -> Tensor:
        hidden, inputs = torch.cat(values), torch.cat(segments)
        return (self.head(hidden)[:, :-1] - inputs[:, 1:]).square().mean()


def train(rank: int, meet: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Trained())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(4, 100, 8, generator=torch.Generator().manual_seed(1))[rank::2]
    for _ in range(3):
        optimizer.zero_grad()
        model(data).backward()
        optimizer.step()
    checksum = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    checksums = [torch.empty_like(checksum) for _ in range(2)]
    dist.all_gather(checksums, checksum)
    if rank == 0:  # alone, so that two processes do not write into each other's lines
        for sender, value in enumerate(checksums):
            print(f"rank {sender}: parameters sum to {value.item():.15f}")
    del model, optimizer
    gc.collect()  # DDP is a cycle of references, and would keep the process group until the process exits
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(f"{folder}/meet",), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
