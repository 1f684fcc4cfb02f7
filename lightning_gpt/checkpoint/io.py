"""Checkpoint files: written whole or not at all, and read as plain data, so a stranger's can't run code. Torch only."""

import errno
import hashlib
import io
import math
import os
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizers import Tokenizer, build_from_state
from ..model.gpt import GPT, GPTConfig
from ..model.lecture import LectureModel, build_net
from .validation import check_archive, check_contents, check_plain

RUNS_DIR = Path("checkpoints")  # where runs land
FORMAT = 2  # of the files; 1 had no seal
QUANTIZED_FORMAT = 3  # the format with one byte a weight
CHECKSUM, CHECKSUM_SIZE = b"sha256 ", len("sha256 ") + 64
TEXT_SETTINGS = (
    "corpus",
    "token_files",
    "vocab_size",
    "split",
    "tokenizer",
    "vocabulary",
    "on_unknown",
)  # what val/loss is of
TMP_PREFIX = ".draft."  # how the names of unfinished files begin


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint file meant by a path, or by `best` or `last`: the newest of that name below checkpoints/.

    Raises:
        FileNotFoundError: there is none.
    """
    if str(name) not in ("best", "last"):
        if not Path(name).is_file():
            what = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
            raise FileNotFoundError(f"the checkpoint {name} {what}")
        return Path(name)
    files = newest_first(RUNS_DIR.glob(f"**/{name}.ckpt"))
    if not files:
        raise FileNotFoundError(
            f"there is no {name}.ckpt below {RUNS_DIR}/: train one with `lightning-gpt fit`, or give --ckpt_path FILE"
        )
    return files[0]


def newest_first(files: Iterable[Path]) -> list[Path]:
    return sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)


def check_regular_file(path: Path) -> None:
    """Raises OSError if something is there that is no regular file: a device or a pipe must not become one."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise OSError(f"{path} can't be written: it is {what}, not a file")


def write_checkpoint(saved: dict, path: str | Path) -> None:
    """Save so that under `path` there is a whole file at any moment: the one before, or this one.

    The file ends with the SHA-256 of all bytes before, stored as the zip archive's comment, so `read_checkpoint`
    detects any change.

    Raises:
        OSError: it can't be written, or does not read back as it was written; what was there before still is.
    """
    buffer, path = io.BytesIO(), Path(os.path.realpath(path))  # a link stays one
    check_regular_file(path)
    torch.save(saved | {"format": QUANTIZED_FORMAT if "scales" in saved else FORMAT}, buffer)
    with buffer.getbuffer() as archive:
        archive[-2:] = CHECKSUM_SIZE.to_bytes(2, "little")  # an archive ends with the length of its comment
        seal = CHECKSUM + hashlib.sha256(archive).hexdigest().encode()
    buffer.seek(0, io.SEEK_END)
    buffer.write(seal)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(
        f"{TMP_PREFIX}{path.name}.{os.getpid()}"
    )  # beside it: only inside a file system a move is atomic
    try:
        with open(draft, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if checksum_mismatch(draft.read_bytes()) is not False:
            raise OSError(errno.EIO, "what was written does not read back", str(path))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def checksum_mismatch(data: bytes) -> bool | None:
    """Whether the checksum at the end of a checkpoint belongs to other bytes; None if there is no checksum."""
    body, seal = memoryview(data)[:-CHECKSUM_SIZE], data[-CHECKSUM_SIZE:]
    return seal != CHECKSUM + hashlib.sha256(body).hexdigest().encode() if seal.startswith(CHECKSUM) else None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours as Lightning saved it, on the CPU, each byte checked against the file's checksum.

    Raises:
        ValueError: the file is damaged, carries code, or is not a checkpoint of this package; where another one is
            good, the message names it.
    """
    try:
        return read_verified(Path(path))
    except ValueError as error:
        for other in newest_first(
            {*Path(path).absolute().parent.glob("*.ckpt"), *RUNS_DIR.absolute().glob("**/*.ckpt")}
        ):
            if other != Path(path).absolute() and is_valid(other):
                raise ValueError(f"{error}. The newest good one is {os.path.relpath(other)}") from None
        raise


def checkpoint_summary(path: Path) -> tuple[int, float, dict] | None:
    """A checkpoint's step, its val/loss (nan without one) and the settings of the text that it was measured on.

    Weights and checksum are not read, so it takes milliseconds; None where the file says nothing of the kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > 2**24 for part in archive.infolist() if part.filename.endswith("data.pkl")):
                return None
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        data = {name: saved["datamodule_hyper_parameters"].get(name) for name in TEXT_SETTINGS}
        return int(saved["global_step"]), float(saved.get("val_loss", math.nan)), data
    except Exception:  # whatever a damaged or hostile file makes the reader say
        return None


def is_valid(path: Path) -> bool:
    with suppress(ValueError, OSError):
        return bool(read_verified(path))
    return False


def read_verified(path: Path) -> dict:
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the checkpoint {path} is empty")
    broken = checksum_mismatch(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = sum(entry.file_size for entry in archive.infolist()) <= len(data)  # else nothing is unpacked
            broken = broken or broken is None and stored and archive.testzip() is not None
    except Exception:  # whatever half an archive makes the reader say
        raise ValueError(f"{path} is not a checkpoint, or only a part of one: it is no complete archive") from None
    if broken:
        raise ValueError(f"the checkpoint {path} is damaged: its bytes are not those of its checksum")
    try:
        saved = read_plain(data)
    except Exception as error:  # whatever a damaged or hostile file makes the reader say
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"the checkpoint {path} can't be read as plain data, so nothing was loaded: {reason}"
        ) from None
    parts = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters")
    if not isinstance(saved, dict) or any(not isinstance(saved.get(part), dict) for part in parts):
        raise ValueError(f"{path} is a PyTorch file, but no checkpoint of lightning-gpt: it lacks {', '.join(parts)}")
    made_by = saved.get("format", 1)
    if type(made_by) is not int or made_by not in (1, FORMAT, QUANTIZED_FORMAT):
        raise ValueError(
            f"the checkpoint {path} has format {str(made_by)[:40]}, and this lightning-gpt reads up to "
            f"{QUANTIZED_FORMAT}: install a newer one"
        )
    if made_by != 1 and not data[-CHECKSUM_SIZE:].startswith(CHECKSUM):
        raise ValueError(f"the checkpoint {path} is damaged: its checksum is missing")
    try:
        dequantize(saved)
        check_contents(saved)
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} does not fit this version of lightning-gpt: {error}") from None
    return saved


def read_plain(data: bytes) -> Any:
    """What `torch.save` wrote, if that is plain values and dense tensors and takes no more room than `data`.

    Raises:
        Exception: of whatever kind, if it is something else.
    """
    check_archive(data)
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    check_plain(saved, len(data))
    return saved


def dequantize(saved: dict) -> None:
    """Turn weights of one byte, as `quantize` writes them, into floating-point numbers, in place.

    Raises:
        ValueError: a scale is not one number for each row of such a weight.
    """
    weights = saved["state_dict"] = dict(saved["state_dict"])  # without what else a state_dict of torch's carries
    scales = saved.pop("scales", {})
    for name, scale in scales.items() if isinstance(scales, dict) else [(None, None)]:
        w = weights.get(name)
        if isinstance(w, Tensor) and isinstance(scale, Tensor) and w.dim() == 2 and scale.shape == w.shape[:1]:
            weights[name] = w * scale[:, None]
        else:
            raise ValueError(f"the scale of {str(name)[:40]!r} is not one number for each row of it")


def load_net(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT | LectureModel, Tokenizer]:
    """The net and the tokenizer of a checkpoint, ready to sample from, in float32 on `device`."""
    saved = read_checkpoint(path)
    sizes, weights = saved["hyper_parameters"], saved["state_dict"]
    with torch.device(device):
        net = build_net(sizes)
    prefix = "ema_net." if sizes.get("ema_decay") else "net."  # the average is what was validated
    net.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
    return net.eval(), build_from_state(
        saved["datamodule_hyper_parameters"], sizes.get("vocab_size", GPTConfig.vocab_size)
    )


def atomic_write(path: str | Path, data: bytes) -> None:
    """Save so that under `path` there is a whole file at any moment, the one before or this one.

    A link stays a link. What is no regular file, a device or a pipe, is written to and not replaced.

    Raises:
        OSError: it can't be written; a regular file that was there before still is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    draft = path.with_name(f".draft.{os.getpid()}")  # beside it: only inside a file system a move is atomic
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
