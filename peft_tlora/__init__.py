"""T-LoRA for PEFT and diffusers: LoRA whose active rank follows the timestep."""

from .config import TLoraConfig
from .generation import FusedGeneration
from .hosts import diffusers, saving, trainers
from .integrations import peft
from .loading import load_tlora_weights
from .model import TLoraModel
from .regularization import orthogonality_loss
from .schedule import active_rank
from .timestep.functions import timestep_from
from .timestep.state import timestep_context

__version__ = "0.1.0"
__all__ = [
    "FusedGeneration",
    "TLoraConfig",
    "TLoraModel",
    "__version__",
    "active_rank",
    "load_tlora_weights",
    "orthogonality_loss",
    "timestep_context",
    "timestep_from",
]

peft.install(TLoraConfig, TLoraModel)
diffusers.install()
trainers.install()
saving.install()
