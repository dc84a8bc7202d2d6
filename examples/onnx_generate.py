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
import onnxruntime  # type: ignore[import-untyped]


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
    length, special, overlap = about["segment_length"], about["special_tokens"], about["model"]["dec_overlap"]
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

    def begin(segment: Sequence[int]) -> list[int]:
        """What the decoder reads before it goes on from a segment: the start token, and the segment's last tokens."""
        return [special["start"], *([special["start"]] * overlap + [*segment])[len(segment) :]]

    segment, rest = [special["start"]], list(prompt)
    looked_at, memory = read(segment)
    while len(rest) >= length:
        segment, rest = rest[:length], rest[length:]
        looked_at, memory = read(segment, memory)
    written, known = [*begin(segment), *rest], 0  # the decoder's tokens, and how many of them it has read
    for _ in range(count):
        for position in range(known, len(written)):
            step = {"token": np.array([written[position]]), "position": np.array([position]), "cache": cache}
            logits, cache = decode.run(None, step | looked_at)
        logits[:, list(special.values())] = -np.inf
        token = int(logits.argmax())
        yield token
        known = len(written)
        written.append(token)
        if len(written) == 1 + overlap + length:
            segment = written[-length:]
            looked_at, memory = read(segment, memory)
            written, known = begin(segment), 0


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
