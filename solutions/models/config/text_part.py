"""The text model inside a model that also sees or hears: its part of ``config.json``, and of the names of tensors.

Such a config.json describes each part under a name of its own, and what all parts have in common beside them. Of the weights,
those of the other parts are passed over; those of the text model lie below a prefix, which versions of transformers spell
differently. Where a model counts positions by the height and width of images, text alone counts them as usual.
"""

from __future__ import annotations

import re
from typing import Any

from .entries import ModelError

SHARED = (
    "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "compression_config",
)  # fmt: skip
"""Entries that may stand beside the parts; there they hold for all."""
TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that have a ``model_type`` of their own, and compute what this one does."""
OLDER_TYPES = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
"""Models that older files describe without parts: the entries are the text model's."""
OTHER_READERS = ("paligemma",)
"""Models whose prompts see later tokens, too, so that their text model alone reads them wrongly."""

_PREFIX = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:(?=lm_head\b)|(?:model\.)?)")
_OTHER_PARTS = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|vision_encoder|visual|multi_modal_projector|connector|image_newline|audio_tower"
    r"|embed_vision|embed_audio|patch_merger|vision_language_adapter)\b"
)


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The text model's config.json; `hf` itself where that is all there is.

    Raises:
        ModelError: it does not read as a text model does.
    """
    model_type, text = hf.get("model_type"), hf.get("text_config")
    if model_type in OTHER_READERS:
        raise ModelError(f"{model_type} is not supported: each token of its prompts sees those behind it, too")
    if not isinstance(text, dict):
        older = OLDER_TYPES.get(model_type) if isinstance(model_type, str) else None
        return hf if older is None else hf | {"architectures": None, "model_type": older}
    if "hidden_size" not in text:
        text = _with_defaults(text)
    shared = {name: hf[name] for name in SHARED if hf.get(name) is not None}
    tied = bool(text.get("tie_word_embeddings")) or bool(hf.get("tie_word_embeddings"))
    if tied:  # each may be silent or a default; a head in the files settles it
        shared["tie_word_embeddings"] = True
    kind = text.get("model_type")
    return text | shared | {"architectures": text.get("architectures"), "model_type": TEXT_TYPES.get(str(kind), kind)}


def _with_defaults(text: dict[str, Any]) -> dict[str, Any]:
    """Older files leave out what is the family's default, even sizes."""
    import transformers  # takes a second

    try:
        filled: dict[str, Any] = transformers.AutoConfig.for_model(**text).to_dict()
    except Exception:  # an unknown model_type, or entries of the wrong kind: whoever reads them says so
        return text
    return filled | text


def text_name(name: str) -> str | None:
    """What the text model alone calls a tensor; None: it belongs to another part."""
    if _OTHER_PARTS.match(name):
        return None
    rest = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    return rest if rest == name or rest.startswith("lm_head") else f"model.{rest}"
