"""Files: opened without running anything that they hold, and replaced in one step or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_TEXT_LIMIT = 1 << 20  # bytes of a JSON or YAML file; ours have a few kilobytes
_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "lora.pt")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Args:
        path: The file.
        tensors: Its tensors by name.
        metadata: The metadata of a safetensors file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def open_file(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> AdapterFile:
    """Read all tensors of a file.

    Args:
        source: A file, or a folder with one in it.
        allow_pickle: Whether a pickled file (.pt) is read, too. It is unpickled with
            `weights_only=True`, which never runs code of the file.

    Raises:
        ValueError: If there is no such file, it is damaged, or it is pickled without leave.
    """
    path = _find(Path(source))
    if path.suffix in _PICKLES:
        if not allow_pickle:
            raise ValueError(
                f"{path} is a pickle, and safetensors files alone are read without being asked. "
                "Pass allow_pickle=True (--allow-pickle) if it comes from a place you trust."
            )
        return AdapterFile(path, _unpickle(path), {})
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return AdapterFile(
                path, {name: file.get_tensor(name) for name in names}, file.metadata() or {}
            )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"There is no file or folder {source}.")
    found = [source / name for name in _IN_FOLDERS if (source / name).is_file()]
    found = found or sorted(source.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{source} should hold one adapter, found {names}; name the file.")
    return found[0]


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in every way there is
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} can't be unpickled safely: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} should hold a dictionary of tensors.")
    for key, value in content.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key[:200]!r} claims more elements than the file holds.")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file; a ValueError if it is none, too large or too deep."""
    return _read(Path(path), json.loads, "JSON")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file of plain values; a ValueError as `read_json`."""
    return _read(Path(path), yaml.safe_load, "YAML")


def parse_json(text: str, what: str) -> Any:
    """The values that JSON text says; a ValueError that names `what` it is, if it is none."""
    return _parse(text, what, json.loads, "JSON")


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.stat().st_size > _TEXT_LIMIT:
        raise ValueError(f"{path} is larger than {_TEXT_LIMIT} bytes, too large for its purpose.")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is no {kind} of plain values: {error}") from None
    return _parse(text, str(path), parse, kind)


def _parse(text: str, what: str, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what} is no {kind} of plain values: {reason}") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, which appears whole or not at all."""
    with replaced(path) as new:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, new, {"format": "pt", **(metadata or {})})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, which appears whole or not at all."""
    with replaced(path) as new:
        new.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to be written in the place of `path`, which takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        new.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        _flush(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replaced_together(folder: Path, *indices: str) -> Iterator[Path]:
    """A folder for files that take their places in `folder` together when all are written.

    Until then nothing in `folder` changes. Then they are moved, one right after the other, and
    meanwhile there are no indices: a crash at this moment leaves old and new files, but nothing
    that says of one what is true of the other.

    Args:
        folder: Where the files go; made if it isn't there, and gone again if that fails.
        indices: Names of the files that say what the others are; they are moved last.
    """
    there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            yield Path(name)
            files = sorted(Path(name).iterdir(), key=lambda file: file.name in indices)
            for file in files:
                _flush(file)
            for index in indices:
                (folder / index).unlink(missing_ok=True)
            for file in files:
                file.replace(folder / file.name)
    except BaseException:
        if not there:
            with suppress(OSError):  # some files are in their places
                folder.rmdir()
        raise


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
