"""Reading checkpoints: plain data only, so a file from a stranger can't run code. Torch only."""

import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from .model import GPT, GPTConfig
from .tokenizer import CharTokenizer

ROOT = Path("checkpoints")  # where runs land


def find(name: str | Path) -> Path:
    """The checkpoint file meant by a path, or by `best` or `last`: the newest of that name below checkpoints/.

    Raises:
        FileNotFoundError: there is none.
    """
    if str(name) not in ("best", "last"):
        if not Path(name).is_file():
            what = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
            raise FileNotFoundError(f"the checkpoint {name} {what}")
        return Path(name)
    files = sorted(ROOT.glob(f"**/{name}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"there is no {name}.ckpt below {ROOT}/: train one with `lightning-gpt fit`, or give --ckpt_path FILE"
        )
    return files[-1]


def read(path: str | Path) -> dict:
    """A checkpoint of ours as Lightning saved it, on the CPU, each byte checked against the file's checksums.

    Raises:
        ValueError: the file is damaged, carries code, or is not a checkpoint of this package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"the checkpoint {path} is damaged: {broken} has a wrong checksum")
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is not a checkpoint, or only a part of one: it is no complete archive") from None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader say
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"the checkpoint {path} can't be read as plain data, so nothing was loaded: {reason}"
        ) from None
    parts = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters")
    if not isinstance(saved, dict) or any(not isinstance(saved.get(part), dict) for part in parts):
        raise ValueError(f"{path} is a PyTorch file, but no checkpoint of lightning-gpt: it lacks {', '.join(parts)}")
    return saved


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, CharTokenizer]:
    """The net and the tokenizer of a checkpoint, ready to sample from, in float32 on `device`."""
    saved = read(path)
    sizes = saved["hyper_parameters"]
    try:
        with torch.device(device):
            net = GPT(GPTConfig(**{field.name: sizes[field.name] for field in fields(GPTConfig)}))
        prefix = "average." if sizes.get("ema_decay") else "net."  # the average is what was validated
        net.load_state_dict({k.removeprefix(prefix): w for k, w in saved["state_dict"].items() if k.startswith(prefix)})
        tokenizer = CharTokenizer(saved["datamodule_hyper_parameters"]["vocabulary"])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the checkpoint {path} does not fit this version of lightning-gpt: {reason}") from None
    if not all(p.isfinite().all() for p in net.parameters()):
        raise ValueError(f"the checkpoint {path} has weights that are no numbers: its training diverged")
    return net.eval(), tokenizer
