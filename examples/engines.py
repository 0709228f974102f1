"""Train a LoRA script with T-LoRA in two processes on the CPU, by one of accelerate's engines.

    python examples/engines.py fsdp2 train_dreambooth_lora_z_image.py --rank 16 ...

It is a trial of an engine without a GPU: `accelerate launch` starts one process on a CPU and gives
it neither FSDP nor ZeRO. On GPUs use that; docs/hosts.md has a command for each engine.
"""

import os
import runpy
import subprocess
import sys

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",  # the model's own _no_split_modules
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_USE_ORIG_PARAMS": "true",  # frozen and trained parameters share a unit
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ENGINES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp": FSDP | {"FSDP_VERSION": "1"},
    "fsdp2": FSDP | {"FSDP_VERSION": "2"},
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def take_the_cpu_for_an_accelerator() -> None:
    """Let accelerate choose FSDP or ZeRO, which it keeps from a CPU."""
    import torch.distributed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore
    torch.distributed.init_process_group("gloo")


def main() -> int:
    engine, *script = sys.argv[1:] or [None]
    if engine not in ENGINES or not script:
        print(f"usage: {sys.argv[0]} {'|'.join(ENGINES)} SCRIPT [ITS ARGUMENTS]", file=sys.stderr)
        return 2
    if "LOCAL_RANK" not in os.environ:
        torchrun = ["torch.distributed.run", "--nproc_per_node", "2", __file__, engine, *script]
        return subprocess.call([sys.executable, "-m", *torchrun], env=os.environ | ENGINES[engine])
    if engine != "ddp":
        take_the_cpu_for_an_accelerator()
    sys.argv = ["peft-tlora", "run", *script]
    runpy.run_module("peft_tlora", run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
