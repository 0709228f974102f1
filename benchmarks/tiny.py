"""Where the host's time is all there is: layers 32 wide, and the operators dispatched for a layer.

    python benchmarks/tiny.py [--layers 64] [--repeats 41] [--rank 8] [--operators]

A denoiser of linear layers, one after the other, is called with a batch of two: with one timestep,
known on the host as trainers without batches and pipelines on a CPU have it, and with one a sample.
Adapters are in float32 and in the base's dtype. Operators are what torch dispatches below autograd,
without those that only make a view; what is done once a forward counts, divided by the layers.
"""

import argparse
from collections.abc import Callable

import torch
from measure import device, interleaved, ratio, report
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_tlora import TLoraConfig

WIDTH = 32
MODELS = {
    "LoRA": LoraConfig,
    "T-LoRA": TLoraConfig,
    "Vanilla T-LoRA": lambda **kwargs: TLoraConfig(ortho_init=None, **kwargs),
}


class Denoiser(nn.Module):
    """Linear layers with a residual each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, sample: torch.Tensor, timestep: object) -> torch.Tensor:
        for layer in self.layers:
            sample = layer(sample)
        return sample


class Operators(TorchDispatchMode):
    """Counts operators by name, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            name = str(func.overloadpacket).removeprefix("aten.")
            self.names[name] = self.names.get(name, 0) + 1
        return result


def timesteps(kind: str, share: float) -> object:
    """One timestep at this share of the schedule, or two that lie apart."""
    if kind == "one":
        return 1000 * share
    return torch.tensor([1000 * share, 1000 * (1 - share)])


def model_of(name: str, layers: int, r: int, base: torch.dtype, adapter: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = MODELS[name](r=r, lora_alpha=r, target_modules=r"layers\.\d+")
    model = get_peft_model(Denoiser(layers).to(base), config, autocast_adapter_dtype=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.requires_grad:
            tensor.data = 0.1 * torch.randn_like(tensor, dtype=adapter)
        elif "_init." in name:
            tensor.data = tensor.data.to(adapter)
    return model.to(device())


def step(model: nn.Module, x: torch.Tensor, timestep: object, trained: list) -> None:
    """A forward, and if there are parameters to be trained a backward."""
    with torch.set_grad_enabled(bool(trained)):
        output = model(x, timestep)
    if trained:
        output.sum().backward()
        for parameter in trained:
            parameter.grad = None


def trained_of(model: nn.Module, backward: bool) -> list:
    """The parameters that an optimiser would hold."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and backward]


def timed(model: nn.Module, x: torch.Tensor, kind: str, backward: bool, repeats: int) -> Callable:
    trained = trained_of(model, backward)

    def prepare(repeat: int) -> Callable[[], None]:
        timestep = timesteps(kind, (repeat + 0.5) / repeats)
        return lambda: step(model, x, timestep, trained)

    return prepare


def operators(model: nn.Module, x: torch.Tensor, kind: str, backward: bool) -> dict[str, int]:
    trained = trained_of(model, backward)
    step(model, x, timesteps(kind, 0.3), trained)  # what is done but once doesn't count
    counted = Operators()
    with counted:
        step(model, x, timesteps(kind, 0.3), trained)
    return counted.names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--operators", action="store_true", help="print the count of each")
    arguments = parser.parse_args()
    layers, dtypes = arguments.layers, (torch.float32, torch.bfloat16)
    rows = []
    for base, adapter in (dtypes[:1] * 2, (dtypes[1], dtypes[0]), dtypes[1:] * 2):
        models = {name: model_of(name, layers, arguments.rank, base, adapter) for name in MODELS}
        for backward in (False, True):
            x = torch.randn(2, 16, WIDTH, device=device(), dtype=base, requires_grad=backward)
            for kind in ("one", "one a sample"):
                cases = {
                    n: timed(m, x, kind, backward, arguments.repeats) for n, m in models.items()
                }
                times = interleaved(cases, arguments.repeats, warmup=3)
                cells = []
                for name, model in models.items():
                    names = operators(model, x, kind, backward)
                    count = sum(names.values()) / layers
                    if arguments.operators:
                        print(name, base, kind, backward, names)
                    middle = sorted(times[name])[arguments.repeats // 2]
                    cells.append(f"{1e6 * middle / layers:.0f} µs, {count:.1f} operators")
                    cells[-1] += "" if name == "LoRA" else f", {ratio(times, name, 'LoRA')[1]}"
                dtype = f"{base}, adapter {adapter}".replace("torch.", "")
                rows.append([dtype, "both" if backward else "forward", kind, *cells])
                print(rows[-1], flush=True)
    report(
        "tiny",
        f"A layer {WIDTH} wide with its adapter, r = {arguments.rank}: host time and operators",
        ["dtype", "step", "timestep", *MODELS],
        rows,
        "Medians a layer, operators dispatched a layer, and behind the comma the time divided by "
        f"LoRA's of the same round: median and quartiles of {arguments.repeats} rounds.",
    )


if __name__ == "__main__":
    main()
