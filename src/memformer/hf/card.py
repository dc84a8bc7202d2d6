"""The card of a saved model: what a reader of its folder, or of its page on a hub, is told first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["TAGS", "write_card"]

TAGS = ["memformer", "memory"]
"""By which a hub finds such models."""

_TEXT = """---
{data}
---

# {title}

{about}

It reads texts of any length, segment by segment, with a memory of fixed size.

```python
import memformer.hf  # pip install 'memformer-replay[hf]'
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r})
out = model(input_ids)  # out.memory goes into the next call: model(more_ids, memory=out.memory)
```
"""


def write_card(folder: Any, title: str, about: str, base: str | None = None) -> None:
    """Write ``README.md`` into a folder, unless one is there.

    Args:
        folder: where the model was saved.
        title, about: its name, and a paragraph on what it is.
        base: the model that it was made of, by its name on a hub; of a path, which says nothing elsewhere, only the
            last part is shown.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        return
    named = base if base and base.count("/") == 1 and not Path(base).exists() else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=named,
        ignore_metadata_errors=True,
    )
    title += f" around {Path(base).name}" if base else ""
    text = _TEXT.format(data=data.to_yaml(), title=title, about=about, folder=path.parent.name)
    ModelCard(text).save(path)
