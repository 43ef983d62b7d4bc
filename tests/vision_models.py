"""Vision models of random weights, as folders that transformers opens: the real classes, of the smallest sizes."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "large", "small", "red", "blue", "circle", "square", "squares", "at", "the", "top", "left", "bottom"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 28, "patch_size": 14}


def save_dinov2(folder: Path, **preparation: object) -> Path:
    """A DINOv2; `preparation` changes its preprocessor_config.json."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**{**SIZES, **IMAGES, "mlp_ratio": 2})
    transformers.Dinov2Model(config).save_pretrained(folder)
    prepare = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=28, **preparation)
    prepare.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP with both sides and a tokenizer of WORDS."""
    torch.manual_seed(1)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS, "<start>", "<end>"])}
    start, end = vocabulary["<start>"], vocabulary["<end>"]
    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 8, **ends}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGES}, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
