"""Which modules are denoisers, and how each class of them takes its timestep."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import nn

from ..schedule import TimestepType
from .paths import root_of

Layout = Literal["batch_first", "sequence_first", "repacked", "other_tokens"]


@dataclass(frozen=True)
class Denoiser:
    """How a class of denoisers is told the time.

    Args:
        argument: The timestep among the arguments of its forward: a name, or a path such as
            `video.sigma` or `timesteps[0]`; None if it has none, so that only `timestep_context`
            can tell it.
        num_train_timesteps: The value that means pure noise (or clean, if reversed).
        timestep_reversed: Whether 0 is pure noise.
        timestep_type: "linear", or "log_sigma" for 0.25 ln(sigma); None if the scheduler decides
            and the values must tell.
        per_sample: Whether the argument holds one value for each sample (and maybe token). If not,
            the noisiest value stands for the batch.
        repacked: Names of submodules whose rows are not batch-major: samples of different
            timesteps can't be told apart there.
        sequence_first: Names of submodules whose inputs are (tokens, batch, features).
        other_tokens: Names of submodules, as a regular expression that a name's parts are searched
            for, whose tokens aren't those that a timestep a token belongs to, but the text's, say.
        timeless: Names of submodules that a host also runs by themselves, once for all timesteps,
            such as an encoder of the condition: all ranks of their layers are active.
    """

    argument: str | None = "timestep"
    num_train_timesteps: float = 1000.0
    timestep_reversed: bool = False
    timestep_type: TimestepType | None = "linear"
    per_sample: bool = True
    repacked: tuple[str, ...] = ()
    sequence_first: tuple[str, ...] = ()
    other_tokens: str = (
        r"(^|\.)(attn2|cross_attn)\.(to_)?[kv](_|\.|$)|add_[qkv]|text|caption|context|prompt|"
        r"encoder|audio|image_(embed|proj)|clip|face|motion"
    )

    timeless: tuple[str, ...] = ()

    def is_timeless(self, layer_name: str) -> bool:
        """Whether a layer lies in one of its parts without time."""
        return not set(self.timeless).isdisjoint(layer_name.split("."))

    def layout(self, layer_name: str) -> Layout:
        """How the batch lies in the input of a layer."""
        parts = layer_name.split(".")
        if any(name in parts for name in self.repacked):
            return "repacked"
        if any(name in parts for name in self.sequence_first):
            return "sequence_first"
        if re.search(self.other_tokens, layer_name):
            return "other_tokens"
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
    AllegroTransformer3DModel AnyFlowTransformer3DModel
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

# by class name, subclasses included, or by "library:class name" where another library has used the
# name. An entry holds for a class whose forward has the argument; None is for a class without time.
# Anything else counts as unknown, and a user may add a class of their own before making an adapter
DENOISERS: dict[str, DenoiserEntry | None] = {
    **{name: Denoiser() for name in _TO_1000},
    **{name: Denoiser(num_train_timesteps=1.0) for name in _TO_1},
    **{name: Denoiser(num_train_timesteps=1.0, timestep_reversed=True) for name in _FROM_0_TO_1},
    # its last layer sees the frames that are denoised, without those of the context
    "AnyFlowFARTransformer3DModel": Denoiser(other_tokens=rf"{Denoiser.other_tokens}|^proj_out"),
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
    # of other libraries
    "acestep:ACEStepTransformer2DModel": Denoiser(timeless=("lyric_encoder", "speaker_embedder")),
    "diffsynth:Flux2DiT": Denoiser(num_train_timesteps=1.0),
    "ltx_core:LTXModel": Denoiser(argument="video.sigma", num_train_timesteps=1.0),
    "OmniGen:OmniGen": Denoiser(num_train_timesteps=1.0, timestep_reversed=True),
    "videox_fun:WanTransformer3DModel": Denoiser(argument="t"),
}
# of classes that aren't known: names of diffusers, ComfyUI and Wan, lucidrains, SiT; of Cosmos
GENERIC_ARGUMENTS = (
    *("timestep", "timesteps", "t", "time", "times", "ts", "time_step"),
    *("timesteps_B_T", "timestep_B_T"),
)
# kinds of models whose layers see no timestep, by the class or library they derive from
_TIMELESS_LIBRARIES = ("transformers", "sentence_transformers", "open_clip", "timm")
_TIMELESS = re.compile(r"Autoencoder|VQModel|TextEncoder|TextModel|ImageEncoder|ImageProjection")


def describe(module: nn.Module) -> Denoiser | None:
    """How a module takes its timestep, None if it takes none.

    A class that `DENOISERS` doesn't have counts if its forward has one of `GENERIC_ARGUMENTS`: one
    of an unknown library, or one of diffusers that takes adapters. Its other unknown classes are
    inner blocks, whose `timestep` is an embedding, and those of transformers mean another time.
    """
    cls = type(module)
    known = _known(module)
    if known is not None:
        return known
    library = library_of(cls)
    takes_adapters = any(base.__name__ == "PeftAdapterMixin" for base in cls.__mro__)
    if library == "transformers" or (library == "diffusers" and not takes_adapters):
        return None
    arguments = forward_arguments(cls)
    name = next((name for name in GENERIC_ARGUMENTS if name in arguments), None)
    return None if name is None else Denoiser(argument=name)


def is_known(module: nn.Module) -> bool:
    """Whether an entry of `DENOISERS` holds for the module."""
    return _known(module) is not None


def is_timeless(module: nn.Module) -> bool:
    """Whether a module is of a kind without a timestep: a text encoder, an autoencoder."""
    return any(
        library_of(base) in _TIMELESS_LIBRARIES
        or _TIMELESS.search(base.__name__)
        or any(DENOISERS.get(name, ...) is None for name in _names(base))
        for base in type(module).__mro__
    )


def _names(cls: type) -> tuple[str, str]:
    return f"{library_of(cls)}:{cls.__name__}", cls.__name__


def _known(module: nn.Module) -> Denoiser | None:
    for base in type(module).__mro__:
        for name in _names(base):
            entry = DENOISERS.get(name)
            if entry is not None:
                entry = entry if isinstance(entry, Denoiser) else entry(module)
                argument = entry.argument
                if argument is None or _may_take(type(module), root_of(argument)):
                    return entry
    return None


class Holder(NamedTuple):
    """The module that takes the timestep of a layer.

    Args:
        module: The module.
        denoiser: How it takes the timestep.
        inside: The layer's name in it.
    """

    module: nn.Module
    denoiser: Denoiser
    inside: str


def find_denoiser(model: nn.Module, layer_name: str) -> Holder | None:
    """The outermost module that holds a layer and takes a timestep; known classes go first."""
    module, parts, takers = model, layer_name.split("."), []
    for depth, attribute in enumerate(parts):
        denoiser = describe(module)
        if denoiser:
            takers.append(Holder(module, denoiser, ".".join(parts[depth:])))
        module = getattr(module, attribute)
    known = [taker for taker in takers if is_known(taker.module)]
    return next(iter(known or takers), None)


def library_of(cls: type[nn.Module]) -> str:
    """The package that defines a class."""
    return cls.__module__.partition(".")[0]


@functools.cache
def forward_arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward, without self.

    What it passes on by *args and **kwargs are the arguments of the class that it derives from.
    """
    names: list[str] = []
    by_position = False
    for base in cls.__mro__:
        if "forward" not in vars(base) or base is nn.Module:
            continue
        parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())
        plain = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]
        names += plain[len(names) :] if by_position else [n for n in plain if n not in names]
        by_position = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if not by_position and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(names)


def _may_take(cls: type[nn.Module], argument: str) -> bool:
    """Whether a class's forward has an argument, as far as its signature tells.

    A decorator that hides it leaves *args and **kwargs alone.
    """
    return argument in forward_arguments(cls) or not forward_arguments(cls)
