"""Checkpoint files: written atomically with a checksum, and read as plain data, so that no file can run code."""

import errno
import hashlib
import io
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.corpus import match_files
from ..data.tokenizers import Tokenizer, build_from_state
from ..model.gpt import GPT
from ..model.lecture import LectureModel, build_net
from ..model.reward import RewardModel
from .validation import STAGES, check_archive, check_contents, check_plain, short_repr, stage_of

RUNS_DIR = Path("checkpoints")  # the folder of all runs
LANGUAGE_MODELS = tuple(stage for stage in STAGES if stage != "reward")
FORMAT = 2  # floating-point weights
PLAIN_FORMAT = 0  # of files that a Trainer without AsyncCheckpointIO writes: they have neither format nor checksum
QUANTIZED_FORMAT = 3  # int8 weights
CHECKSUM, CHECKSUM_SIZE = b"sha256 ", len("sha256 ") + 64
TEXT_SETTINGS = (
    "corpus",
    "token_files",
    "vocab_size",
    "split",
    "tokenizer",
    "vocabulary",
    "on_unknown",
    "template",
)  # val/loss depends on these
TMP_PREFIX = ".tmp."  # of the names of temporary files


def find_checkpoint(name: str | Path, stages: Sequence[str] = LANGUAGE_MODELS) -> Path:
    """Path of a checkpoint; `best` and `last` stand for the newest file of that name below checkpoints/.

    Args:
        stages: the commands whose files `best` and `last` stand for.
    Raises:
        FileNotFoundError: there is no such file.
    """
    if str(name) not in ("best", "last"):
        if not Path(name).is_file():
            reason = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
            if set(str(name)) & set(",*?"):
                reason += "; give one file: only generate, score, validate and test take a list or a pattern"
            raise FileNotFoundError(f"the checkpoint {name} {reason}")
        return Path(name)
    for file in newest_first(RUNS_DIR.glob(f"**/{name}.ckpt")):
        summary = checkpoint_summary(file)
        if summary is None or summary[2]["stage"] in stages:  # None: reading the file will tell what is wrong
            return file
    raise FileNotFoundError(
        f"there is no {name}.ckpt of {' or '.join(stages)} below {RUNS_DIR}/: train one with `lightning-gpt "
        f"{stages[0]}`, or give the path of a file"
    )


def find_checkpoints(names: str | Path, find: Callable[[str | Path], Path] = find_checkpoint) -> list[Path]:
    """Paths of a comma-separated list of checkpoints and of patterns such as `checkpoints/*/*/checkpoints/best.ckpt`.

    Args:
        find: finds one of them; best and last may be in the list.
    Raises:
        FileNotFoundError: there is no such file, or none matches. ValueError: an item of the list is empty.
    """
    paths: list[Path] = []
    for name in [str(names)] if Path(names).exists() else [part.strip() for part in str(names).split(",")]:
        if not name:
            raise ValueError(f"the list of checkpoints {str(names)!r} has an empty item: remove it")
        is_pattern = bool(set(name) & set("*?")) and not Path(name).exists()
        if is_pattern and not match_files(name):
            raise FileNotFoundError(f"no checkpoint matches the pattern {name}")
        paths += match_files(name) if is_pattern else [find(name)]
    return paths


def newest_first(files: Iterable[Path]) -> list[Path]:
    """The regular files among `files`, the most recently modified first."""
    return sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)


def check_regular_file(path: Path) -> None:
    """Raises OSError if `path` is a folder, a device or a pipe, which must not be replaced by a file."""
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a device or a pipe"
        raise OSError(f"{path} can't be written: it is {found}, not a file")


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint atomically: `path` is a complete file at all times, either the previous one or the new one.

    The file ends with the SHA-256 of all preceding bytes, stored as the zip archive's comment, so `read_checkpoint`
    detects any change.

    Raises:
        OSError: the file can't be written, or does not read back as written; the previous file is unchanged.
    """
    buffer, path = io.BytesIO(), Path(os.path.realpath(path))  # keep a symbolic link, replace its target
    check_regular_file(path)
    torch.save(checkpoint | {"format": QUANTIZED_FORMAT if "scales" in checkpoint else FORMAT}, buffer)
    append_checksum(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}.{os.getpid()}")  # renaming is atomic only within a file system
    try:
        with open(tmp, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if not has_valid_checksum(tmp.read_bytes()):
            raise OSError(errno.EIO, "the written file does not read back correctly", str(path))
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems can't sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def append_checksum(buffer: io.BytesIO) -> None:
    """Append to a zip archive its own SHA-256, as the archive's comment."""
    with buffer.getbuffer() as archive:
        archive[-2:] = CHECKSUM_SIZE.to_bytes(2, "little")  # a zip archive ends with the length of its comment
        checksum = CHECKSUM + hashlib.sha256(archive).hexdigest().encode()
    buffer.seek(0, io.SEEK_END)
    buffer.write(checksum)


def has_valid_checksum(data: bytes) -> bool:
    """Whether the bytes of a file end with the SHA-256 of all preceding bytes."""
    body = memoryview(data)[:-CHECKSUM_SIZE]
    return data[-CHECKSUM_SIZE:] == CHECKSUM + hashlib.sha256(body).hexdigest().encode()


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this package onto the CPU, with all bytes checked against the file's checksum.

    Quantized weights are returned in floating point.

    Raises:
        ValueError: the file is damaged, contains more than plain data, or is not a checkpoint of this package; the
            message names the newest valid checkpoint, if there is one.
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
    """A checkpoint's step, its val/loss (NaN if it has none), and its stage with the settings of its text.

    None if it can't be read.

    The weights and the checksum are not read, so this takes milliseconds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > 2**24 for part in archive.infolist() if part.filename.endswith("data.pkl")):
                return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        data = {name: checkpoint["datamodule_hyper_parameters"].get(name) for name in TEXT_SETTINGS}
        data["stage"] = stage_of(checkpoint)
        return int(checkpoint["global_step"]), float(checkpoint.get("val_loss", math.nan)), data
    except Exception:  # a damaged or hostile file can raise anything
        return None


def is_valid(path: Path) -> bool:
    """Whether `read_verified` accepts the file."""
    with suppress(ValueError, OSError):
        return bool(read_verified(path))
    return False


def read_verified(path: Path) -> dict:
    """As `read_checkpoint`, but the error message does not name another checkpoint."""
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the checkpoint {path} is empty")
    has_checksum = data[-CHECKSUM_SIZE:].startswith(CHECKSUM)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = sum(entry.file_size for entry in archive.infolist()) <= len(data)  # otherwise nothing is unpacked
            is_damaged = not has_valid_checksum(data) if has_checksum else stored and archive.testzip() is not None
    except Exception:  # a truncated archive can raise anything
        raise ValueError(f"{path} is not a checkpoint or is truncated: it is not a complete zip archive") from None
    if is_damaged:
        raise ValueError(f"the checkpoint {path} is damaged: its bytes do not match its checksum")
    try:
        checkpoint = read_plain(data)
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"the checkpoint {path} can't be read as plain data and was not loaded: {reason}") from None
    parts = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters")
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(part), dict) for part in parts):
        raise ValueError(
            f"{path} is a PyTorch file, but not a lightning-gpt checkpoint, which has {', '.join(parts)} and "
            "comes from training with a TextDataModule"
        )
    file_format = checkpoint.get("format", PLAIN_FORMAT)
    if type(file_format) is not int or file_format not in (PLAIN_FORMAT, FORMAT, QUANTIZED_FORMAT):
        raise ValueError(
            f"the checkpoint {path} has format {short_repr(file_format)}, and this lightning-gpt reads {FORMAT} and "
            f"{QUANTIZED_FORMAT}: install the version that wrote it"
        )
    if file_format != PLAIN_FORMAT and not has_checksum:
        raise ValueError(f"the checkpoint {path} is damaged: its checksum is missing")
    try:
        dequantize(checkpoint)
        check_contents(checkpoint)
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} does not fit this version of lightning-gpt: {error}") from None
    return checkpoint


def read_plain(data: bytes) -> Any:
    """Load the bytes of a `torch.save` file that holds only plain values and dense tensors, no larger than the file.

    Raises:
        Exception: of any type, if the file holds anything else.
    """
    check_archive(data)
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    check_plain(loaded, len(data))
    return loaded


def dequantize(checkpoint: dict) -> None:
    """Replace the int8 weights that `quantize` writes by floating-point weights, in place, and drop their scales.

    Raises:
        ValueError: a weight with a scale is not a matrix, or its scale does not have one value per row.
    """
    weights = checkpoint["state_dict"] = dict(checkpoint["state_dict"])  # a copy, without torch's _metadata
    scales = checkpoint.pop("scales", {})
    for name, scale in scales.items() if isinstance(scales, dict) else [(None, None)]:
        w = weights.get(name)
        if isinstance(w, Tensor) and isinstance(scale, Tensor) and w.dim() == 2 and scale.shape == w.shape[:1]:
            weights[name] = w * scale[:, None]
        else:
            raise ValueError(f"the scale of {str(name)[:40]!r} does not have one value for each row")


def load_net(
    path: str | Path, device: str | torch.device = "cpu", reward: bool = False
) -> tuple[GPT | LectureModel, Tokenizer]:
    """The net of a checkpoint, in evaluation mode and float32 on `device`, and its tokenizer.

    Raises:
        ValueError: the file is not a valid checkpoint of a language model or, with `reward`, of a reward model.
    """
    checkpoint = read_checkpoint(path)
    settings, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    if (stage_of(checkpoint) == "reward") != reward:
        found, needed = ("a language model", "a reward model")[:: 1 if reward else -1]
        raise ValueError(f"the checkpoint {path} is {found}, and {needed} is needed here: give another")
    with torch.device(device):
        net = build_net(settings)
        net = RewardModel(net.config) if reward else net
    prefix = "ema_net." if settings["ema_decay"] else "net."  # val/loss is of the weight average
    net.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
    return net.eval(), build_from_state(checkpoint["datamodule_hyper_parameters"], settings["vocab_size"])


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file atomically: `path` is a complete file at all times, either the previous one or the new one.

    A symbolic link is kept and its target replaced. A device or a pipe is written to, not replaced.

    Raises:
        OSError: the file can't be written; a previous regular file is unchanged.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    tmp = path.with_name(f"{TMP_PREFIX}{os.getpid()}")  # renaming is atomic only within a file system
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
