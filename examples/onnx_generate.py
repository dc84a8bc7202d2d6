"""Continue a text from the files of ``memformer export``, with numpy and onnxruntime alone.

    memformer export --checkpoint runs/default --out exported
    pip install numpy onnxruntime
    python examples/onnx_generate.py exported --prompt "import " --max-new-tokens 200

Takes the likeliest byte each time. Memory and time per byte do not grow, however long the text.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime


class Exported(NamedTuple):
    about: dict[str, Any]
    encode: onnxruntime.InferenceSession
    decode: onnxruntime.InferenceSession


def load(folder: Path) -> Exported:
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return Exported(about, *(onnxruntime.InferenceSession(folder / step["file"]) for step in about["steps"].values()))


def generate(exported: Exported, prompt: Sequence[int], count: int) -> Iterator[int]:
    """The likeliest tokens after a prompt."""
    about, encode, decode = exported
    length, special = about["segment_length"], about["special_tokens"]
    shapes = {name: [size if size != "batch" else 1 for size in x["shape"]]
              for step in about["steps"].values() for name, x in step["inputs"].items()}  # fmt: skip
    cache = np.zeros(shapes["cache"], np.float32)

    def read(segment: Sequence[int], memory: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What the decoder looks at, and the memory after the segment; without a memory a document begins."""
        mask = np.ones((1, len(segment)), bool)
        begins = np.array([memory is None])
        if memory is None:
            memory = np.zeros(shapes["memory"], np.float32)
        inputs = {"tokens": np.array([segment]), "mask": mask, "memory": memory, "reset": begins}
        memory, context = encode.run(["memory_after", "context"], inputs)
        return {"context": context, "mask": mask}, memory

    looked_at, memory = read([special["start"]])
    pending = list(prompt)
    while len(pending) >= length:
        looked_at, memory = read(pending[:length], memory)
        pending = pending[length:]
    waiting = [special["start"], *pending]  # tokens that the decoder has not seen
    for _ in range(count):
        for position, token in enumerate(waiting, len(pending) + 1 - len(waiting)):
            step = {"token": np.array([token]), "position": np.array([position]), "cache": cache, **looked_at}
            logits, cache = decode.run(None, step)
        logits[:, list(special.values())] = -np.inf
        token = int(logits.argmax())
        yield token
        pending.append(token)
        waiting = [token]
        if len(pending) == length:
            looked_at, memory = read(pending, memory)
            pending, waiting = [], [special["start"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what memformer export wrote, of a model of bytes")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    settings = parser.parse_args()
    exported = load(settings.folder)
    if exported.about["special_tokens"].get("start") != 256:
        parser.error(f"{settings.folder}: expected the export of a model of bytes, as memformer train makes it")
    tokens = generate(exported, list(settings.prompt.encode()), settings.max_new_tokens)
    print(settings.prompt + bytes(tokens).decode(errors="replace"))


if __name__ == "__main__":
    main()
