"""Which modules are denoisers, and how each class of them takes its timestep."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from .schedule import TimestepType

Layout = Literal["batch_first", "sequence_first", "repacked"]


@dataclass(frozen=True)
class Denoiser:
    """How a class of denoisers is told the time.

    Args:
        argument: Name of the timestep argument of its forward; None if it has none, so that only
            `timestep_context` can tell it.
        num_train_timesteps: The value that means pure noise (or clean, if reversed).
        timestep_reversed: Whether 0 is pure noise.
        timestep_type: "linear", or "log_sigma" for 0.25 ln(sigma); None if the scheduler decides
            and the values must tell.
        per_sample: Whether the argument holds one value for each sample (and maybe token). If not,
            the noisiest value stands for the batch.
        repacked: Names of submodules whose rows are not batch-major: samples of different
            timesteps can't be told apart there.
        sequence_first: Names of submodules whose inputs are (tokens, batch, features).
    """

    argument: str | None = "timestep"
    num_train_timesteps: float = 1000.0
    timestep_reversed: bool = False
    timestep_type: TimestepType | None = "linear"
    per_sample: bool = True
    repacked: tuple[str, ...] = ()
    sequence_first: tuple[str, ...] = ()

    def layout(self, layer_name: str) -> Layout:
        """How the batch lies in the input of a layer."""
        parts = layer_name.split(".")
        if any(name in parts for name in self.repacked):
            return "repacked"
        if any(name in parts for name in self.sequence_first):
            return "sequence_first"
        return "batch_first"


DenoiserEntry: TypeAlias = Denoiser | Callable[[nn.Module], Denoiser]


def _qwen_image(model: nn.Module) -> Denoiser:
    # with zero_cond_t the rows of the modulation are all samples, then all of them once more at 0
    doubled = getattr(model.config, "zero_cond_t", False)
    return Denoiser(
        num_train_timesteps=1.0, repacked=("time_text_embed", "img_mod") if doubled else ()
    )


def _sana(model: nn.Module) -> Denoiser:
    if getattr(model.config, "guidance_embeds", False):  # Sana-Sprint
        return Denoiser(num_train_timesteps=1.0)
    return Denoiser(num_train_timesteps=1000.0 * getattr(model.config, "timestep_scale", 1.0))


_TO_1000 = """
    AllegroTransformer3DModel AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel
    AudioLDM2UNet2DConditionModel BriaFiboTransformer2DModel BriaTransformer2DModel
    ChronoEditTransformer3DModel CogVideoXTransformer3DModel CogView3PlusTransformer2DModel
    CogView4Transformer2DModel ConsisIDTransformer3DModel ControlNetModel ControlNetUnionModel
    DiTTransformer2DModel EasyAnimateTransformer3DModel HeliosTransformer3DModel
    HunyuanDiT2DControlNetModel HunyuanDiT2DModel HunyuanDiT2DMultiControlNetModel
    HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel
    HunyuanVideoFramepackTransformer3DModel HunyuanVideoTransformer3DModel I2VGenXLUNet
    JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel Kandinsky3UNet
    Kandinsky5Transformer3DModel Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel
    LTX2VideoTransformer3DModel LTXVideoTransformer3DModel LatteTransformer3DModel
    MotifVideoTransformer3DModel MultiControlNetModel MultiControlNetUnionModel
    PixArtTransformer2DModel PriorTransformer SD3ControlNetModel SD3MultiControlNetModel
    SD3Transformer2DModel SanaControlNetModel SanaVideoTransformer3DModel
    SanaWMLTX2RefinerTransformer3DModel SanaWMTransformer3DModel SkyReelsV2Transformer3DModel
    SparseControlNetModel UNet2DModel UNet3DConditionModel UNetControlNetXSModel
    UNetFlatConditionModel UNetMotionModel WanAnimate2Transformer3DModel
    WanAnimateTransformer3DModel WanTransformer3DModel WanVACETransformer3DModel
""".split()
_TO_1 = """
    AceStepTransformer1DModel AuraFlowTransformer2DModel BriaFibo2Transformer2DModel
    ChromaTransformer2DModel CosmosControlNetModel CosmosTransformer3DModel Flux2Transformer2DModel
    Flux3Transformer2DModel FluxControlNetModel FluxMultiControlNetModel FluxTransformer2DModel
    Krea2Transformer2DModel LongCatImageTransformer2DModel NucleusMoEImageTransformer2DModel
    OvisImageTransformer2DModel PRXTransformer2DModel QwenImage21Transformer2DModel
    QwenImageControlNetModel QwenImageMultiControlNetModel StableAudio3DiTModel StableAudioDiTModel
    UNet1DModel
""".split()
_FROM_0_TO_1 = """
    Ideogram4Transformer2DModel LongCatAudioDiTTransformer Lumina2Transformer2DModel
    LuminaNextDiT2DModel MiniMaxMusic3Transformer1DModel OmniGenTransformer2DModel
""".split()
_Z_IMAGE = Denoiser(
    argument="t",
    num_train_timesteps=1.0,
    timestep_reversed=True,
    repacked=("all_x_embedder", "cap_embedder", "siglip_embedder", "control_all_x_embedder"),
)

# by class name, subclasses included; anything that isn't here counts as unknown, and a user may add
# a class of their own before making an adapter
DENOISERS: dict[str, DenoiserEntry] = {
    **{name: Denoiser() for name in _TO_1000},
    **{name: Denoiser(num_train_timesteps=1.0) for name in _TO_1},
    **{name: Denoiser(num_train_timesteps=1.0, timestep_reversed=True) for name in _FROM_0_TO_1},
    "Cosmos3OmniTransformer": Denoiser(argument="vision_timesteps", per_sample=False),
    "DreamLiteUNetModel": Denoiser(),
    "ErnieImageTransformer2DModel": Denoiser(sequence_first=("mlp", "final_linear")),
    "GlmImageTransformer2DModel": Denoiser(num_train_timesteps=999.0),
    "HiDreamImageTransformer2DModel": Denoiser(argument="timesteps", repacked=("experts",)),
    "MiniMaxH3Transformer3DModel": Denoiser(
        num_train_timesteps=1.0, timestep_reversed=True, per_sample=False
    ),
    "MochiTransformer3DModel": Denoiser(timestep_reversed=True),
    "QwenImageTransformer2DModel": _qwen_image,
    "RFD4ProteinaTransformer": Denoiser(
        argument="bb_ca_time", num_train_timesteps=1.0, timestep_reversed=True
    ),
    "SanaTransformer2DModel": _sana,
    "StableCascadeUNet": Denoiser(argument="timestep_ratio", num_train_timesteps=1.0),
    "T5FilmDecoder": Denoiser(argument="decoder_noise_time", num_train_timesteps=1.0),
    "Transformer2DModel": Denoiser(num_train_timesteps=100.0),  # VQ-Diffusion; elsewhere a block
    "UNet2DConditionModel": Denoiser(timestep_type=None),  # EDM's schedulers pass 0.25 ln(sigma)
    "UNetSpatioTemporalConditionModel": Denoiser(timestep_type="log_sigma"),
    "UVit2DModel": Denoiser(argument=None),
    "UniDiffuserModel": Denoiser(argument="timestep_img"),
    "WuerstchenDiffNeXt": Denoiser(argument="r", num_train_timesteps=1.0),
    "WuerstchenPrior": Denoiser(argument="r", num_train_timesteps=1.0),
    "ZImageControlNetModel": _Z_IMAGE,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
_GENERIC_ARGUMENTS = ("timestep", "timesteps", "t")


def describe(module: nn.Module) -> Denoiser | None:
    """How a module takes its timestep, None if it takes none.

    A class that `DENOISERS` doesn't have counts if its forward has an argument `timestep`,
    `timesteps` or `t`: one of an unknown library, or one of diffusers that takes adapters. Its
    other unknown classes are inner blocks, whose `timestep` is an embedding, and those of
    transformers mean another time.
    """
    cls = type(module)
    for base in cls.__mro__:
        if base.__name__ in DENOISERS:
            entry = DENOISERS[base.__name__]
            return entry if isinstance(entry, Denoiser) else entry(module)
    library = library_of(cls)
    takes_adapters = any(base.__name__ == "PeftAdapterMixin" for base in cls.__mro__)
    if library == "transformers" or (library == "diffusers" and not takes_adapters):
        return None
    arguments = forward_arguments(cls)
    name = next((name for name in _GENERIC_ARGUMENTS if name in arguments), None)
    return None if name is None else Denoiser(argument=name)


def is_known(module: nn.Module) -> bool:
    """Whether `DENOISERS` has the module's class or one that it derives from."""
    return any(base.__name__ in DENOISERS for base in type(module).__mro__)


def find_denoiser(model: nn.Module, layer_name: str) -> tuple[nn.Module, Denoiser] | None:
    """The outermost module that holds a layer and takes a timestep; known classes go first."""
    path = [model]
    for attribute in layer_name.split(".")[:-1]:
        path.append(getattr(path[-1], attribute))
    takers = [(module, found) for module in path if (found := describe(module))]
    known = [taker for taker in takers if is_known(taker[0])]
    return next(iter(known or takers), None)


def name_inside(model: nn.Module, layer_name: str, holder: nn.Module) -> str:
    """The name that a layer of a model has in one of the modules on its path."""
    module, parts = model, layer_name.split(".")
    while module is not holder and parts:
        module = getattr(module, parts.pop(0))
    return ".".join(parts)


def library_of(cls: type[nn.Module]) -> str:
    """The package that defines a class."""
    return cls.__module__.partition(".")[0]


@functools.cache
def forward_arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]
