"""Real diffusers pipelines with small random models and a tokenizer of single letters, built offline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def scheduler_config() -> dict[str, Any]:
    """The noise schedule of Stable Diffusion."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def ddpm() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return quiet(DDPMPipeline(_lively(unet), DDPMScheduler()))


def stable_diffusion(folder: Path, in_channels: int = 4) -> StableDiffusionPipeline:
    """in_channels: 9 for a U-Net of in-painting."""
    torch.manual_seed(0)
    return quiet(
        StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_lively(CLIPTextModel(_text_config())),
            tokenizer=tokenizer(folder),
            unet=_unet(in_channels),
            scheduler=DDIMScheduler(**scheduler_config()),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = _unet(
        4,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        use_linear_projection=True,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_lively(CLIPTextModel(_text_config())),
            text_encoder_2=_lively(CLIPTextModelWithProjection(_text_config())),
            tokenizer=tokenizer(folder),
            tokenizer_2=tokenizer(folder),
            unet=unet,
            scheduler=DDIMScheduler(**scheduler_config()),
            add_watermarker=False,
        )
    )


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters, of which a word's last carries the mark of its end."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    return CLIPTokenizer.from_pretrained(folder)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
    )


def _unet(in_channels: int, **options: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": in_channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return _lively(UNet2DConditionModel(**{**settings, **options}))


def _vae() -> AutoencoderKL:
    return _lively(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    )


def _lively(model: Any) -> Any:
    """No weight zero or one, so that every one of them counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
