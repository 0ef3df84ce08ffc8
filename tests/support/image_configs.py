"""Vision-language models of any type that transformers builds: config.json and the settings of its image processor.

Sizes are those of each type's config class, which `distlora.derive.shrink` makes small.
"""

from __future__ import annotations

import json
from typing import Any

from distlora.derive.shrink import read_settings
from support.model_types import config_of

_MROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN = {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [16, 24, 24]}}}
_GLM_MOE = {
    "text_config": {
        "head_dim": 128,
        "rope_parameters": _MROPE | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    }
}
_GLM = {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 768, "num_attention_heads": 12, "image_size": 224}
_GEMMA = {"mm_tokens_per_image": 49}
_IDEFICS = {"vision_config": {"image_size": 364, "patch_size": 14}}
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _QWEN),
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _GLM),
    **dict.fromkeys(("gemma3", "shieldgemma2"), _GEMMA),
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS),
    "glm4v_moe": _GLM_MOE,
    "step3p7": {"text_config": {"sliding_window": 512}},
    "glm_ocr": {"text_config": {"head_dim": 128, "rope_parameters": _MROPE | {"mrope_section": [16, 24, 24]}}},
    "aria": {"vision_config": {"model_type": "idefics3_vision", "image_size": 490, "patch_size": 14}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "aya_vision": {"vision_config": _SIGLIP | {"patch_size": 16}},
    "minicpmv4_6": {"image_token_id": 5, "video_token_id": 6},
    "lfm2_vl": {
        "text_config": {
            "model_type": "lfm2",
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        }
    },
    "minimax_m3_vl": {
        "text_config": {"num_hidden_layers": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
    },
}
"""Settings that checkpoints of a type have and its config class leaves out."""
_WHOLE = {"size": {"longest_edge": 364}, "max_image_size": {"longest_edge": 364}, "do_image_splitting": False}
PROCESSORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("idefics3", "smolvlm"), _WHOLE),
    "aria": {"max_image_size": 490, "split_image": False},
}
"""The same for image processors."""
_LIKE = {
    "glmga": "glm46v",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "mistral4": "mistral3",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen2_5_omni",
    "fast_vlm": "llava",
    "diffusion_gemma": "gemma4",
}
"""Types whose checkpoints name the image processor of another type."""


def image_content(model_type: str) -> dict[str, Any]:
    """Return {"config": config.json, "processor": settings of the image processor} of a full-size model."""
    config = read_settings({**config_of(model_type), **CONFIGS.get(model_type, {})})
    return json.loads(json.dumps({"config": config, "processor": processor_settings(model_type, config)}))


def processor_settings(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the type's image processor, with the sizes of the tower in `config`; empty without one."""
    from transformers.models.auto import image_processing_auto as auto

    names = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(_LIKE.get(model_type, model_type))
    if names is None:
        return {}
    name = names.get("torchvision") or names["pil"]
    processor = auto.get_image_processor_class_from_name(name)()
    settings = processor.to_dict() | {"image_processor_type": name}
    vision = config.get("vision_config") or {}
    for of_tower, of_processor in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("spatial_merge_size", "merge_size"),
    ):
        if isinstance(settings.get(of_processor), int) and isinstance(vision.get(of_tower), int):
            settings[of_processor] = vision[of_tower]
    size = vision.get("image_size")
    size = size[0] if isinstance(size, (list, tuple)) else size
    if isinstance(size, int) and {"height", "width"} <= (settings.get("size") or {}).keys():
        settings["size"] = {"height": size, "width": size}
    if isinstance(size, int) and settings.get("crop_size"):
        settings["crop_size"] = {"height": size, "width": size}
        settings["size"] = {"shortest_edge": size}
    return settings | PROCESSORS.get(model_type, {})
