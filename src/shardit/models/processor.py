"""Qwen's vision-language processor without torchvision.

transformers builds `Qwen2VLProcessor` and `Qwen2_5_VLProcessor` only together with a video processor, which needs
torchvision. Image pipelines never pass a video, so the same class works with the tokenizer and the PIL image
processor alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLASSES = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")


def is_needed(class_name: str) -> bool:
    """True if transformers cannot build this processor class itself (torchvision is missing)."""
    from transformers.utils.import_utils import is_torchvision_available

    return class_name in CLASSES and not is_torchvision_available()


def build_processor(folder: str | Path, class_name: str = CLASSES[0]) -> Any:
    """Return an instance of the real processor class for `folder`: tokenizer, PIL image processor, no video
    processor."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    folder = Path(folder)
    cls = getattr(transformers, class_name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    processor: ProcessorMixin = cls.__new__(cls)
    processor.tokenizer = tokenizer
    processor.image_processor = _pil_image_processor(folder)
    processor.video_processor = None
    processor.chat_template = _chat_template(folder) or getattr(tokenizer, "chat_template", None)
    for kind, default in (("image", "<|image_pad|>"), ("video", "<|video_pad|>")):
        token = getattr(tokenizer, f"{kind}_token", default)
        setattr(processor, f"{kind}_token", token)
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    return processor


def _pil_image_processor(folder: Path) -> Any:
    """Return the image processor that works on PIL images and numpy, by the name it has in this transformers."""
    import transformers

    for name in ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor"):
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls.from_pretrained(str(folder))
    raise ImportError("this transformers has no Qwen2-VL image processor")


def _chat_template(folder: Path) -> str | None:
    """Return the processor's chat template: a Jinja file, or the older JSON file."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None
