"""The same linear layers adapted by T-LoRA, PEFT's LoRA, LyCORIS' tlora and a naive T-LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_tlora import TLoraConfig, active_rank, timestep_context

PEERS = ["base", "LoRA", "T-LoRA", "naive"] + ["LyCORIS"] * (find_spec("lycoris") is not None)


class Naive(nn.Module):
    """The formula, term by term; its initial values don't matter for the time."""

    mask: Tensor

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base
        self.q = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.p = nn.Parameter(torch.randn(base.out_features, r) / base.out_features**0.5)
        self.lam = nn.Parameter(torch.ones(r))
        for name in ("q", "p", "lam"):
            self.register_buffer(f"{name}0", getattr(self, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x0 = x.to(self.q.dtype)
        trained = linear(linear(x0, self.q) * self.lam * self.mask, self.p)
        frozen = linear(linear(x0, self.q0) * self.lam0 * self.mask, self.p0)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        return (self.base(x) + trained - frozen).to(dtype)


class Adapted:
    """A model whose linear layers of some names one of the peers has adapted, trained a little.

    Args:
        peer: One of `PEERS`.
        model: The model, in the dtype of its base; adapters are in float32.
        r: The rank.
        targets: Endings of the layers' names.
    """

    def __init__(self, peer: str, model: nn.Module, r: int, targets: list[str]) -> None:
        self.peer, self.model, self.r = peer, model, r
        model.requires_grad_(False)
        self.masked: list[Any] = []
        if peer == "LoRA":
            get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets))
        elif peer == "T-LoRA":
            get_peft_model(model, TLoraConfig(r=r, lora_alpha=r, target_modules=targets))
        elif peer != "base":
            self._replace(targets)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter += 0.01 * torch.randn_like(parameter)

    def _replace(self, targets: list[str]) -> None:
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, nn.Linear) or not name.endswith(tuple(targets)):
                continue
            if self.peer == "naive":
                parent, _, child = name.rpartition(".")
                adapted = Naive(module, self.r).to(module.weight.device)
                setattr(self.model.get_submodule(parent), child, adapted)
            else:
                from lycoris.modules.tlora import TLoraModule  # pyright: ignore[reportMissingImports]

                dtype = module.weight.dtype
                module.float()  # for its SVD
                adapted = TLoraModule(
                    name.replace(".", "_"), module, lora_dim=self.r, alpha=self.r, sig_type="last"
                )
                module.to(dtype)
                adapted.to(module.weight.device).apply_to()
                module.add_module("lycoris", adapted)
            self.masked.append(adapted)

    @contextmanager
    def at(self, timestep: float | Tensor) -> Iterator[None]:
        """The mask of timesteps on the host, for models that have none of their own."""
        if self.peer == "T-LoRA":
            with timestep_context(self.model, timestep):
                yield
            return
        self.set_mask(timestep)
        yield

    def set_mask(self, timestep: float | Tensor) -> None:
        """What the users of the other masked peers do in their loop."""
        active = torch.as_tensor(active_rank(timestep, self.r, 0.5))
        mask = torch.arange(self.r) < active[..., None]
        for module in self.masked:
            if self.peer == "naive":
                module.mask = (mask[:, None] if mask.dim() == 2 else mask).to(self.parameters[0])
        if self.peer == "LyCORIS":
            from lycoris.modules.tlora import set_timestep_mask  # pyright: ignore[reportMissingImports]

            set_timestep_mask(mask.to(self.parameters[0]).reshape(-1, self.r))
