"""Pipelines that make video or audio, and the arguments that stand for a prompt."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import Tensor
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from . import unets, video_audio
from .pipelines import prepared, text_encoder

TEXT = video_audio.TEXT


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline class, small, and how it is called.

    Args:
        build: Makes the pipeline.
        inputs: See `Tiny`.
        prompt: Shape of each embedding of a prompt, by the name of its argument.
        arguments: Other arguments of a call.
        calls: How often the denoiser is called at each timestep.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    inputs: Callable[[int], dict[str, Any]]
    prompt: dict[str, tuple[int, ...]]
    arguments: dict[str, Any]
    calls: int = 1

    def make(self) -> diffusers.DiffusionPipeline:
        """The pipeline, each time with the same weights."""
        torch.manual_seed(0)
        return prepared(self.build())

    def generate(self, pipeline: diffusers.DiffusionPipeline) -> Tensor:
        """Latents, the same for the same weights and masks."""
        torch.manual_seed(3)
        embeddings = {name: torch.randn(1, *shape) for name, shape in self.prompt.items()}
        arguments = {**embeddings, **self.arguments}
        return pipeline(**arguments, num_inference_steps=4, output_type="latent")[0]


def assemble(cls, **parts):
    """A pipeline whose other required parts are None."""
    parameters = inspect.signature(cls).parameters.items()
    required = [name for name, parameter in parameters if parameter.default is parameter.empty]
    return cls(**{**dict.fromkeys(required), **parts})


class CosineScheduler(diffusers.EDMDPMSolverMultistepScheduler):
    """The timesteps of CosineDPMSolverMultistepScheduler, without its need of torchsde."""

    def precondition_noise(self, sigma):
        return sigma.atan() / math.pi * 2


def wan():
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return assemble(diffusers.WanPipeline, transformer=video_audio.wan(), scheduler=scheduler)


def ltx():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return assemble(diffusers.LTXPipeline, transformer=video_audio.ltx(), scheduler=scheduler)


def cogvideox():
    return assemble(
        diffusers.CogVideoXPipeline,
        transformer=video_audio.cogvideox(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def hunyuan_video():
    return assemble(
        diffusers.HunyuanVideoPipeline,
        transformer=video_audio.hunyuan_video(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def animate_diff():
    return assemble(
        diffusers.AnimateDiffPipeline,
        unet=unets.unet_motion(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )


def stable_audio():
    config = {**video_audio.stable_audio().config, "global_states_input_dim": 32}
    return assemble(
        diffusers.StableAudioPipeline,
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2],
            channel_multiples=[1],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=8,
        ),
        projection_model=StableAudioProjectionModel(16, 16, 0, 8),
        transformer=diffusers.StableAudioDiTModel.from_config(config),
        scheduler=CosineScheduler(
            sigma_min=0.3,
            sigma_max=500.0,
            sigma_data=1.0,
            sigma_schedule="exponential",
            prediction_type="v_prediction",
        ),
    )


def audio_ldm2():
    return assemble(
        diffusers.AudioLDM2Pipeline,
        text_encoder_2=text_encoder(),  # these two are asked for their dtype
        language_model=text_encoder(),
        unet=unets.audio_ldm2(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vocoder=SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=32,
                sampling_rate=8,
                upsample_initial_channel=4,
                upsample_rates=[2],
                upsample_kernel_sizes=[4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1]],
            )
        ),
    )


def stable_audio_inputs(batch):
    global_states = torch.randn(batch, 1, 32)
    return {**video_audio.stable_audio_inputs(batch), "global_hidden_states": global_states}


VIDEO = {"height": 32, "width": 32, "num_frames": 9}
MASK = torch.ones(1, TEXT)
GUIDED = {"prompt_embeds": (TEXT, 16), "negative_prompt_embeds": (TEXT, 16)}
PIPELINES = {
    "WanPipeline": TinyPipeline(wan, video_audio.video_inputs, GUIDED, VIDEO, calls=2),
    "LTXPipeline": TinyPipeline(
        ltx,
        video_audio.ltx_inputs,
        GUIDED,
        {
            "height": 64,
            "width": 64,
            "num_frames": 17,
            "prompt_attention_mask": MASK,
            "negative_prompt_attention_mask": MASK,
        },
    ),
    "CogVideoXPipeline": TinyPipeline(cogvideox, video_audio.frames_first_inputs, GUIDED, VIDEO),
    "HunyuanVideoPipeline": TinyPipeline(
        hunyuan_video,
        video_audio.hunyuan_video_inputs,
        {"prompt_embeds": (TEXT, 16), "pooled_prompt_embeds": (12,)},
        {**VIDEO, "prompt_attention_mask": MASK},
    ),
    "AnimateDiffPipeline": TinyPipeline(
        animate_diff, unets.unet_motion_inputs, GUIDED, {**VIDEO, "num_frames": 3}
    ),
    "StableAudioPipeline": TinyPipeline(stable_audio, stable_audio_inputs, GUIDED, {}),
    "AudioLDM2Pipeline": TinyPipeline(
        audio_ldm2,
        unets.audio_ldm2_inputs,
        {
            "prompt_embeds": (2, 8),
            "negative_prompt_embeds": (2, 8),
            "generated_prompt_embeds": (3, 16),
            "negative_generated_prompt_embeds": (3, 16),
        },
        {"audio_length_in_s": 16.0},
    ),
}
