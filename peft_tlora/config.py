"""TLoraConfig: LoRA's configuration plus the rank schedule and the orthogonal initialisation."""

import math
from dataclasses import MISSING, dataclass, field, fields

from peft import LoraConfig, PeftType

from .orthogonal import ORTHO_INITS, ORTHO_SOURCES, OrthoInit, OrthoSource
from .schedule import (
    SCHEDULE_FIELDS,
    RankSchedule,
    RankScheduleKind,
    TimestepType,
    check_choice,
    check_min_rank,
    check_multiple,
    check_rank,
)

# option of LoraConfig -> what to use instead; an option that this PEFT doesn't have is left out
_REFUSED = {
    "use_dora": "T-LoRA already trains singular values; leave it False",
    "use_qalora": "leave it False, a quantised base works without it",
    "use_bdlora": "leave it None",
    "alora_invocation_tokens": "leave it None: the active rank follows the timestep, not tokens",
    "arrow_config": "leave it None and activate adapters with set_adapter",
    "corda_config": "leave it None and use ortho_init with ortho_source",
    "eva_config": "leave it None and use ortho_init with ortho_source",
    "kasa_config": "leave it None: T-LoRA trains singular values itself",
    "loftq_config": "leave it empty and use ortho_init with ortho_source",
    "lora_ga_config": "leave it None and use ortho_init with ortho_source",
    "megatron_config": "leave it None",
    "monteclora_config": "leave it None",
    "velora_config": "leave it None and enable gradient checkpointing to save memory",
    "target_parameters": "target the modules that hold the parameters with target_modules",
    "lora_bias": "leave it False: a bias has no rank that a mask could act on",
}
_INIT_LORA_WEIGHTS = (True, False, "gaussian")


@dataclass
class TLoraConfig(LoraConfig):
    """Configuration of T-LoRA (arXiv 2507.05964), a drop-in replacement for `peft.LoraConfig`.

    Every argument of `LoraConfig` keeps its meaning, save those that make no sense here: they are
    refused by name. `init_lora_weights` initialises Vanilla T-LoRA (`ortho_init=None`); with an
    orthogonal initialisation only `init_lora_weights=False` has an effect: the trained differences
    then aren't zero and the adapter is not the identity, as with LoRA. Embeddings, and
    the layers tied to them with `ensure_weight_tying`, see no timestep: they get plain LoRA at full
    rank.

    Args:
        min_rank: Ranks active at pure noise: an int is a rank in [0, r], a float in [0, 1] a
            fraction of each layer's own r, rounded down but at least 1.
        rank_schedule: "power" for `((T - t) / T) ** schedule_exponent`, "cosine" for
            `((1 + cos(pi t / T)) / 2) ** schedule_exponent`, "constant" for all ranks at every
            timestep, whatever `min_rank` says: the control arm of a comparison.
        schedule_exponent: The paper's alpha, above 0.
        rank_multiple: Ranks that switch on together: the active rank is always a multiple of it, as
            `r`, those of `rank_pattern` and an int `min_rank` must be.
        ortho_init: Which singular triplets initialise the factors: the "last" (smallest), "middle"
            or "principal" (largest) r; None for Vanilla T-LoRA.
        ortho_source: Whose triplets: of a "random" Gaussian matrix or of the layer's "weight".
        num_train_timesteps: The timestep that means pure noise, in the unit of the denoiser's
            forward. None takes it from the denoiser's class, 1000 for an unknown class.
        timestep_reversed: Whether 0 is pure noise and `num_train_timesteps` is clean. None takes it
            from the denoiser's class, False for an unknown class.
        timestep_type: "linear" for time that runs from 0 to `num_train_timesteps`, "log_sigma" for
            0.25 ln(sigma), as EDM's schedulers have it. None takes it from the denoiser's class.
            For UNet2DConditionModel, where the scheduler decides, the values tell then, unless
            `num_train_timesteps` or `timestep_reversed` is given.
        init_seed: Seed of the orthogonal initialisation, from 0 to 2^63 - 1. The start is a
            function of it and each layer's name and shape, on any device and in any order of
            layers: with the default, that of every process, adapter and later load. None draws a
            seed from torch's generator and puts it here. Vanilla T-LoRA and
            `init_lora_weights=False` draw from torch's generator, as LoRA does.
        save_initial_factors: Whether files hold the frozen factors, too, for other readers. Without
            them a file is about as small as LoRA's, and whoever loads it makes the factors again;
            those of `ortho_source="weight"` are always in the file.
        library_name: "peft_tlora": names this package in a saved configuration, for readers that
            don't know the type TLORA.

    Raises:
        ValueError: If a value is out of its range, unknown or not supported with T-LoRA.
        TypeError: If a value has the wrong type.
    """

    min_rank: int | float = field(default=0.5, metadata={"help": "Ranks active at pure noise."})
    rank_schedule: RankScheduleKind = field(
        default="power", metadata={"help": "How the active rank follows the timestep."}
    )
    schedule_exponent: float = field(
        default=1.0, metadata={"help": "Exponent of the rank schedule (the paper's alpha)."}
    )
    rank_multiple: int = field(
        default=1, metadata={"help": "The active rank is always a multiple of this."}
    )
    ortho_init: OrthoInit | None = field(
        default="last", metadata={"help": "Which singular triplets initialise the factors."}
    )
    ortho_source: OrthoSource = field(
        default="random", metadata={"help": "Whose singular triplets initialise the factors."}
    )
    num_train_timesteps: float | None = field(
        default=None, metadata={"help": "The timestep that means pure noise; None asks the model."}
    )
    timestep_reversed: bool | None = field(
        default=None, metadata={"help": "Whether timestep 0 is pure noise; None asks the model."}
    )
    timestep_type: TimestepType | None = field(
        default=None, metadata={"help": "Linear time or 0.25 ln(sigma); None asks the model."}
    )
    init_seed: int | None = field(
        default=0, metadata={"help": "Seed of the orthogonal initialisation; None draws one."}
    )
    save_initial_factors: bool = field(
        default=False, metadata={"help": "Whether files hold the frozen factors."}
    )
    library_name: str = field(
        default="peft_tlora", metadata={"help": "The package to import before loading."}
    )

    def __post_init__(self) -> None:
        """Check every field before PEFT sees it."""
        self._check_lora_options()
        self._check_schedule()
        self._check_initialisation()
        super().__post_init__()
        self.peft_type = PeftType.TLORA  # pyright: ignore[reportAttributeAccessIssue]

    def schedule(
        self,
        r: int,
        num_train_timesteps: float,
        timestep_reversed: bool,
        timestep_type: TimestepType | None,
    ) -> RankSchedule:
        """The schedule of a layer of rank r; the arguments stand in for fields that are None."""
        if self.num_train_timesteps is not None or self.timestep_reversed is not None:
            timestep_type = "linear"
        if self.num_train_timesteps is not None:
            num_train_timesteps = self.num_train_timesteps
        if self.timestep_reversed is not None:
            timestep_reversed = self.timestep_reversed
        unit = {
            "num_train_timesteps": float(num_train_timesteps),
            "timestep_reversed": timestep_reversed,
            "timestep_type": self.timestep_type or timestep_type,
        }
        return RankSchedule(r, **{name: getattr(self, name) for name in SCHEDULE_FIELDS} | unit)

    def _check_lora_options(self) -> None:
        defaults = {
            f.name: f.default if f.default is not MISSING else f.default_factory()  # pyright: ignore[reportCallIssue]
            for f in fields(self)
            if f.name in _REFUSED
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value and value != default:
                raise ValueError(
                    f"{name}={value!r} is not supported with T-LoRA: {_REFUSED[name]}."
                )
        init = self.init_lora_weights
        if isinstance(init, str):
            init = init.lower()
        if init not in _INIT_LORA_WEIGHTS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported with T-LoRA, it "
                "must be True, False or 'gaussian': choose the initialisation with ortho_init and "
                "ortho_source."
            )
        check_rank(self.r, "r")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha >= 0):
            raise ValueError(f"lora_alpha must be finite and at least 0, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")

    def _check_schedule(self) -> None:
        for pattern, r in (self.rank_pattern or {}).items():
            where = f"rank_pattern[{pattern!r}]"
            check_rank(r, where)
            check_min_rank(self.min_rank, r, where)
            check_multiple(self.rank_multiple, r, self.min_rank, where)
        self.schedule(self.r, 1000.0, False, "linear")
        if self.rank_schedule == "constant" and self.schedule_exponent != 1:
            raise ValueError(
                f"schedule_exponent={self.schedule_exponent} has no effect with "
                "rank_schedule='constant'; leave it 1.0 or choose 'power' or 'cosine'."
            )
        if self.timestep_reversed not in (None, True, False):
            raise TypeError(
                f"timestep_reversed must be a bool or None, got {self.timestep_reversed!r}."
            )
        if self.timestep_type == "log_sigma":
            for name in ("num_train_timesteps", "timestep_reversed"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with "
                        "timestep_type='log_sigma', whose values are 0.25 ln(sigma); leave it None."
                    )

    def _check_initialisation(self) -> None:
        check_choice(self.library_name, ("peft_tlora",), "library_name")
        if self.ortho_init is not None:
            check_choice(self.ortho_init, ORTHO_INITS, "ortho_init (if not None)")
        check_choice(self.ortho_source, ORTHO_SOURCES, "ortho_source")
        if self.ortho_init is None and self.ortho_source != "random":
            raise ValueError(
                f"ortho_source={self.ortho_source!r} has no effect with ortho_init=None; choose "
                f"an ortho_init of {list(ORTHO_INITS)} or leave ortho_source out."
            )
        if self.init_seed is not None:
            if isinstance(self.init_seed, bool) or not isinstance(self.init_seed, int):
                raise TypeError(f"init_seed must be an int or None, got {self.init_seed!r}.")
            if not 0 <= self.init_seed < 2**63:
                raise ValueError(f"init_seed must lie in [0, 2^63 - 1], got {self.init_seed}.")
        if not isinstance(self.save_initial_factors, bool):
            raise TypeError(
                f"save_initial_factors must be a bool, got {self.save_initial_factors!r}."
            )
        if self.save_initial_factors and self.ortho_init is None:
            raise ValueError(
                "save_initial_factors=True has no effect with ortho_init=None, which has none: "
                "leave it out."
            )
