"""What a launcher says, what processes must have in common, and how they end. One process alone, unless marked slow."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from memformer import parallel
from memformer.cli import main
from memformer.training import checkpoints
from processes import two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")) or name in (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
        ):  # fmt: skip
            monkeypatch.delenv(name)


def refused(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=": ") as caught, parallel.joined():
        raise AssertionError("joined")
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, as launchers of processes set it, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE: expected a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK: expected this process's number, because WORLD_SIZE is 2; it is not set"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK: expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected a number from 0 to 1, because WORLD_SIZE is 2, got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"}, "MASTER_PORT: not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "MASTER_ADDR: not set"),
        ({"WORLD_SIZE": "2", "SLURM_PROCID": "1"}, "MASTER_ADDR: not set"),
    ],
)
def test_what_a_launcher_leaves_out_is_named(monkeypatch, environment, says):
    assert refused(monkeypatch, **environment).startswith(says)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}])
def test_one_process_needs_no_launcher(monkeypatch, environment):
    """A job's variables are there for what srun did not start, too."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with parallel.joined():
        assert not dist.is_initialized()


class FourAccelerators:
    count, taken = 4, None

    def is_available(self):
        return True

    def device_count(self):
        return self.count

    def set_device_index(self, index):
        self.taken = index


@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "5", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}, 2),
        ({"SLURM_PROCID": "6", "SLURM_LOCALID": "3"}, 3),
        ({"RANK": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),  # of the batch script, not of this process
        ({"RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 3),
        ({"OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"RANK": "6"}, 2),
    ],
)
def test_each_process_takes_the_accelerator_of_its_number_on_the_machine(monkeypatch, environment, taken):
    accelerators = FourAccelerators()
    monkeypatch.setattr(torch, "accelerator", accelerators)
    place = parallel._place({"WORLD_SIZE": "8", **MEETING, **environment})
    parallel._take_accelerator("auto", place)
    assert accelerators.taken == taken
    parallel._take_accelerator("cpu", place)


def test_more_processes_than_accelerators_are_refused(monkeypatch):
    accelerators = FourAccelerators()
    monkeypatch.setattr(torch, "accelerator", accelerators)
    for name, value in {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": "4", **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"process 4 is number 5 on its machine, which has 4 accelerators: start at mo"
    ):
        parallel.joined().__enter__()
    with pytest.raises(ValueError, match=r"device: cuda:1 is one accelerator, but there are 8 processes"):
        parallel.joined("cuda:1").__enter__()
    monkeypatch.delenv("LOCAL_RANK")
    accelerators.count = 1  # srun --gpus-per-task 1: each sees only its own
    parallel._take_accelerator("auto", parallel._Place(4, 8, 4))
    assert accelerators.taken == 0


def different(rank):
    """What two processes say that differ, one of which then fails, as one that loses its connection would notice."""
    said = []
    ranks = parallel.Ranks()
    ranks.agree({"tokenizer": "a" * 64})
    try:
        ranks.agree({"tokenizer": "ab"[rank] * 64, "setting steps": str(5 + rank), "seed": "0"})
    except ValueError as error:
        said.append(re.sub(r"\(on \S+\)", "(on M)", str(error)))
    try:
        with ranks.together():
            if rank:
                raise FileNotFoundError("no such file")
    except OSError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_processes_that_differ_are_named_with_what_differs(tmp_path):
    first, second = two_processes(different, tmp_path)
    assert first[0] == second[0]
    assert first[0] == (
        "process 1 (on M) has another tokenizer than process 0 (on M); process 1 (on M) has another setting steps "
        "than process 0 (on M): 6 instead of 5. All processes of a run need the same of everything"
    )
    assert first[1] == "FileNotFoundError: process 1: no such file"
    assert second[1] == "FileNotFoundError: no such file"


def relayed(rank):
    """What the second process raises where the first one fails, of each kind."""
    said, ranks = [], parallel.Ranks()

    def fail(error):
        raise error

    for error in (BlockingIOError("busy"), FloatingPointError("no number"), PermissionError("not yours"), KeyError(3)):
        for way in ("together", "first"):
            try:
                if way == "first":
                    ranks.first(lambda error=error: fail(error))
                else:
                    with ranks.together():
                        if not rank:
                            raise error
            except Exception as found:
                said.append(f"{type(found).__name__}: {found}")
    return [*said, ranks.first(lambda: "went on")]


def test_an_error_of_another_process_is_of_its_kind(tmp_path):
    """A folder that is in use is a sentence of the command line in whichever process says it."""
    first, second = two_processes(relayed, tmp_path)
    errors = ["BlockingIOError: busy", "FloatingPointError: no number", "PermissionError: not yours", "KeyError: 3"]
    assert first == [error for error in errors for _ in range(2)] + ["went on"]
    kinds = ["BlockingIOError", "FloatingPointError", "OSError", "RuntimeError"]
    told = [f"{kind}: process 0: {error.split(': ')[1]}" for kind, error in zip(kinds, errors, strict=True)]
    assert second == [error for error in told for _ in range(2)] + ["went on"]


def test_an_error_leaves_no_thread_behind(monkeypatch):
    """One of gloo's that outlives the interpreter aborts the process."""
    monkeypatch.setattr(parallel, "_place", lambda environment: parallel._Place(0, 1, None))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ValueError, match="of 1 process"), parallel.joined("cpu"):
        raise ValueError(f"of {dist.get_world_size()} process")
    assert not dist.is_initialized()


# --- The whole command, in several processes


FLAGS = [
    "--dim", "16", "--slots", "2", "--enc-depth", "1", "--dec-depth", "1", "--heads", "2", "--lanes", "4",
    "--segment-length", "8", "--horizon", "2", "--log-every", "5", "--sample-tokens", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(5):
        (tmp_path / "corpus" / f"{i}.txt").write_text("what was seen is not forgotten. " * (3 * i + 8))
    return tmp_path


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(folder, *flags, **environment):
    """One process of the command, without torchrun; its messages go to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "memformer", "train", "--data", "corpus", "--out", "run", *FLAGS, *flags]
    with (folder / f"said-{environment['RANK']}").open("w") as said:
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT, env=environment)


def started(folder, *flags, changes=()):
    """Two processes, the second one with other flags besides."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(folder, *flags, *changes[: rank and None], RANK=str(rank), **place) for rank in range(2)]


def said(folder):
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def errors(text):
    return [line for line in text.splitlines() if "memformer: error:" in line]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_message(folder):
    """What they differ in; a file that one lacks; a setting that is refused everywhere."""
    for flags, changes, expected in [
        ((), ("--data", "corpus/0.txt", "corpus/1.txt"), "process 1 (on"),
        ((), ("--data", "nowhere"), "nowhere"),
        (("--lanes", "3"), (), "lanes: 3 cannot be divided evenly among 2 processes"),
    ]:
        processes = started(folder, "--steps", "3", *flags, changes=changes)
        assert [process.wait(timeout=120) for process in processes] == [2, 2], said(folder)
        both = said(folder)
        assert len(errors("".join(both))) == 1, both
        assert expected in "".join(both)
        assert "Traceback" not in "".join(both)


@pytest.mark.slow
def test_what_is_left_out_is_said_once(folder):
    (folder / "corpus" / "a.zip").write_bytes(b"PK")
    processes = started(folder, "--steps", "1")
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert ["1 archive" in text for text in said(folder)] == [True, False]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_a_sentence_and_the_run_goes_on(folder):
    first, second = started(folder, "--steps", "100000", "--save-every", "1", "--timeout", "1")
    while checkpoints.newest(folder / "run") is None:
        assert first.poll() is None, said(folder)
        time.sleep(0.05)
    second.kill()
    second.wait()
    began = time.monotonic()
    assert first.wait(timeout=100) == 2
    assert time.monotonic() - began < 70
    (line,) = errors(said(folder)[0])
    assert "process 0 of 2: another process of the run ended without a word, or cannot be reached (" in line
    assert "--resume" in line
    step = checkpoints.newest(folder / "run")
    first, second = started(folder, "--resume", "--steps", "100000")
    while "training" not in said(folder)[0]:
        assert first.poll() is None, said(folder)
        time.sleep(0.05)
    for _ in range(2):  # one alone is told to stop, by SLURM and by torchrun: both do, after the same step
        second.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert [first.wait(timeout=100), second.wait(timeout=100)] == [130, 130], said(folder)
    assert int(checkpoints.newest(folder / "run").name[5:]) >= int(step.name[5:])
    assert "stopped and saved at step" in said(folder)[0]


@pytest.mark.slow
def test_two_machines_meet_by_torchrun_and_stop_together(folder):
    """Two groups of torchrun, as on two machines, each with two processes; one group's torchrun is told to stop."""
    port = free_port()
    groups = []
    for node in range(2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "tried",
            "-m", "memformer", "train", "--data", "corpus", "--out", "run", *FLAGS, "--steps", "100000",
            "--parallel", "fsdp", "--no-tie-embeddings", "--save-every", "2",
        ]  # fmt: skip
        with (folder / f"said-{node}").open("w") as told:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            groups.append(subprocess.Popen(command, cwd=folder, stdout=told, stderr=subprocess.STDOUT, env=environment))
    while checkpoints.newest(folder / "run") is None:
        assert all(group.poll() is None for group in groups), said(folder)
        time.sleep(0.1)
    groups[1].send_signal(signal.SIGTERM)
    assert [group.wait(timeout=150) != 0 for group in groups] == [True, True]
    assert "4 processes (fsdp)" in "".join(said(folder))
    assert "stopped and saved at step" in "".join(said(folder)), said(folder)
    assert len(list(checkpoints.newest(folder / "run").glob("shards/*.safetensors"))) == 4
    # On one machine, by one process, with what four have written.
    newest = int(checkpoints.newest(folder / "run").name[5:])
    arguments = ["train", "--resume", "--out", str(folder / "run"), "--data", str(folder / "corpus")]
    assert main([*arguments, "--steps", str(newest + 1)]) == 0
    assert main(["generate", "--checkpoint", str(folder / "run"), "--max-new-tokens", "3", "--prompt", "what"]) == 0
