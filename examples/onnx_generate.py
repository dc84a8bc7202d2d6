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
    length, special, causal = about["segment_length"], about["special_tokens"], about["kind"] == "CausalMemformer"
    start = special["start"]

    def zeros(tensor: dict[str, Any]) -> np.ndarray:
        return np.zeros([size if size != "batch" else 1 for size in tensor["shape"]], tensor["dtype"])

    steps = about["steps"].values()
    # What a step is given as x, and gives back as x_after.
    kept = {name: zeros(x) for step in steps for name, x in step["inputs"].items()
            if f"{name}_after" in step["outputs"]}  # fmt: skip
    cache, encode_gives = kept.pop("cache"), list(about["steps"]["encode"]["outputs"])

    def read(segment: Sequence[int], begins: bool = False) -> tuple[dict[str, np.ndarray], list[int], np.ndarray]:
        """What the decoder looks at after a segment, the tokens that it reads first, and logits if it needs none.

        The memory advances.
        """
        nonlocal kept, cache
        mask = np.full((1, len(segment)), not (causal and begins))  # a causal model has no token before a document
        given = {"tokens": np.array([segment]), "mask": mask, "reset": np.array([begins])}
        found = dict(zip(encode_gives, encode.run(encode_gives, given | kept), strict=True))
        kept = {name: found[f"{name}_after"] for name in kept}
        if causal:
            cache = found["cache"]
            return {"context": found["context"]}, [], found["logits"][:, -1]
        before = [start] * about["model"]["dec_overlap"] + [*segment]
        return {"context": found["context"], "mask": mask}, [start, *before[len(segment) :]], np.empty(0)

    looked_at, before, logits = read([0 if causal else start], begins=True)
    rest = list(prompt)
    while len(rest) >= length:
        looked_at, before, logits = read(rest[:length])
        rest = rest[length:]
    written, known = [*before, *rest], 0  # the decoder's tokens, and how many of them it has read
    for _ in range(count):
        for position in range(known, len(written)):
            step = {"token": np.array([written[position]]), "position": np.array([position]), "cache": cache}
            logits, cache = decode.run(None, step | looked_at)
        logits[:, list(special.values())] = -np.inf
        token = int(logits.argmax())
        yield token
        known = len(written)
        written.append(token)
        if len(written) == len(before) + length:
            looked_at, before, logits = read(written[-length:])
            written, known = [*before], 0


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
