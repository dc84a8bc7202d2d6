"""Makes the files beside it. It ran at commit b7a2976, once: what it wrote is what later versions have to read.

    git worktree add /tmp/before b7a2976
    cd tests/saved_before && PYTHONPATH=/tmp/before/src OMP_NUM_THREADS=1 python make.py

- ``corpus/``: six short documents.
- ``plain/``, ``everything/``: runs of six steps over them without an interruption; the checkpoints of the third and
  of the last step.
- ``normalised/``, ``gated/``, ``encoder/``: what ``save_pretrained`` wrote; ``expected.safetensors`` holds inputs and
  what came of them. The first two have a ``MemoryState`` after a prompt, and the greedy tokens after it.
"""

import copy
import itertools
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from memformer import Memformer, MemoryState
from memformer.cli import main

WORDS = "what a segment leaves in its slots is all that the next one finds there; {} was written, and {} is read. "
THINGS = ["a name", "one number", "the colour of a door", "an open question", "nothing much", "a long way home"]

RUN = (
    "train --data corpus --steps 6 --save-every 3 --keep 6 --log-every 1 --sample-tokens 0 --device cpu --held-out 3 "
    "--dim 4 --slots 3 --enc-depth 1 --dec-depth 1 --heads 2 --lanes 2 --segment-length 8 --horizon 3 --warmup 2"
)
RUNS = {
    "plain": "",
    "everything": "--tokenizer bpe --vocabulary 264 --continuation 0.6 --infilling 0.3 --recall 0.1 --horizon-start 2 "
    "--horizon-steps 4 --accumulate 2 --graphs 2 --ema 0.9 --eval-every 2 --patience 4 --mem-updates 2 "
    "--memory-writer gated --positions relative --dec-overlap 0 --seed 5",
}

VOCABULARY, LENGTH = 11, 5
ENCODER = dict(
    dim=8, num_memory_slots=3, mem_update_attn_heads=2, enc_num_tokens=VOCABULARY, enc_depth=2, enc_heads=2,
    enc_max_seq_len=LENGTH,
)  # fmt: skip
DECODER = dict(dec_num_tokens=VOCABULARY, dec_depth=2, dec_heads=2, dec_max_seq_len=LENGTH + 1)
MODELS = {
    "normalised": dict(**ENCODER, **DECODER, dec_overlap=2, tie_embeddings=True, write_temperature=0.25),
    "gated": dict(**ENCODER, **DECODER, memory_writer="gated", positions="relative", num_mem_updates=2),
    "encoder": dict(**ENCODER, positions="bucketed", encoder_only=True),
}
NOISE = 1e-4


def make_corpus() -> None:
    Path("corpus").mkdir(exist_ok=True)
    for i, thing in enumerate(THINGS):
        text = "".join(WORDS.format(thing, other) for other in THINGS[: i + 1])
        Path("corpus", f"{i}.txt").write_text(text, encoding="utf-8")


def make_run(name: str) -> None:
    if main([*RUN.split(), "--out", name, *RUNS[name].split()]):
        raise SystemExit(f"{name}: not trained")
    for path in Path(name).iterdir():
        if path.is_file() or path.is_symlink():
            path.unlink()
        elif path.name not in ("step-000003", "step-000006"):
            shutil.rmtree(path)


def make_model(name: str) -> None:
    """A model as a trained one could be: each parameter matters, and greedy text is not one token for ever."""
    folder, kept = Path(name), {}
    for seed in itertools.count():
        torch.manual_seed(seed)
        model = Memformer(**MODELS[name]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        if model.config.encoder_only:
            break
        state = model.read([torch.randint(VOCABULARY, (n,)) for n in (7, 13)], start=0)
        kept["greedy"] = greedy(model, state)
        if len(kept["greedy"].unique()) > 4 and is_sure(model, state, kept["greedy"]):
            folder.mkdir(exist_ok=True)
            state.save(folder / "read.state", model)
            break
    model.save_pretrained(folder)
    kept["src"] = src = torch.randint(VOCABULARY, (2, LENGTH))
    kept["src_mask"] = src_mask = torch.tensor([[True] * LENGTH, [True] * (LENGTH - 2) + [False] * 2])
    with torch.no_grad():
        kept["mems"] = mems = model(src)[1]
        if model.config.encoder_only:
            kept["enc_out"], kept["after"] = model(src, mems=mems, src_mask=src_mask)
        else:
            kept["tgt"] = tgt = torch.randint(VOCABULARY, (2, LENGTH + 1))
            kept["enc_out"], kept["after"], kept["loss"] = model(src, tgt, mems=mems, src_mask=src_mask)
    save_file(kept, folder / "expected.safetensors")


def greedy(model: Memformer, state: MemoryState) -> torch.Tensor:
    return torch.stack(model.generate(None, 20, state=state, temperature=0).tokens)


def is_sure(model: Memformer, state: MemoryState, tokens: torch.Tensor) -> bool:
    """The tokens stay the same when each weight is wrong in its fourth digit: rounding chooses no other."""
    for _ in range(20):
        noisy = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in noisy.parameters():
                parameter.mul_(1 + NOISE * torch.randn_like(parameter))
        if not torch.equal(greedy(noisy, state), tokens):
            return False
    return True


if __name__ == "__main__":
    make_corpus()
    for run in RUNS:
        make_run(run)
    for model in MODELS:
        make_model(model)
