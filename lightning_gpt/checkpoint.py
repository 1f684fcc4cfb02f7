"""Checkpoint files: written whole or not at all, and read as plain data, so a stranger's can't run code. Torch only."""

import errno
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contents import VERSION, refuse_bombs, refuse_contradictory, refuse_odd
from .lecture import Rung, build
from .model import GPT, GPTConfig
from .tokenizer import CharTokenizer, Tokenizer, rebuild

ROOT = Path("checkpoints")  # where runs land
FORMAT = 2  # of the files; 1 had no seal
SHRUNK = 3  # the format with one byte a weight
SEAL, SEAL_SIZE = b"sha256 ", len("sha256 ") + 64
MEASURED_ON = "corpus", "tokens", "token_kinds", "split", "tokenizer", "vocabulary", "unknown"  # what val/loss is of
DRAFT = ".draft."  # how the names of unfinished files begin


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
    files = newest_first(ROOT.glob(f"**/{name}.ckpt"))
    if not files:
        raise FileNotFoundError(
            f"there is no {name}.ckpt below {ROOT}/: train one with `lightning-gpt fit`, or give --ckpt_path FILE"
        )
    return files[0]


def newest_first(files: Iterable[Path]) -> list[Path]:
    return sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)


def refuse_special(path: Path) -> None:
    """Raises OSError if something is there that is no regular file: a device or a pipe must not become one."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise OSError(f"{path} can't be written: it is {what}, not a file")


def write(saved: dict, path: str | Path) -> None:
    """Save so that under `path` there is a whole file at any moment: the one before, or this one.

    The file's last bytes, a zip archive's comment, are the SHA-256 of all bytes before, so `read` sees any change.

    Raises:
        OSError: it can't be written, or does not read back as it was written; what was there before still is.
    """
    buffer, path = io.BytesIO(), Path(os.path.realpath(path))  # a link stays one
    refuse_special(path)
    torch.save(saved | {"format": SHRUNK if "scales" in saved else FORMAT}, buffer)
    with buffer.getbuffer() as archive:
        archive[-2:] = SEAL_SIZE.to_bytes(2, "little")  # an archive ends with the length of its comment
        seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    buffer.seek(0, io.SEEK_END)
    buffer.write(seal)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{DRAFT}{path.name}.{os.getpid()}")  # beside it: only inside a file system a move is atomic
    try:
        with open(draft, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if seal_is_broken(draft.read_bytes()) is not False:
            raise OSError(errno.EIO, "what was written does not read back", str(path))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def seal_is_broken(data: bytes) -> bool | None:
    """Whether the checksum at the end of a checkpoint belongs to other bytes; None if there is no checksum."""
    body, seal = memoryview(data)[:-SEAL_SIZE], data[-SEAL_SIZE:]
    return seal != SEAL + hashlib.sha256(body).hexdigest().encode() if seal.startswith(SEAL) else None


def read(path: str | Path) -> dict:
    """A checkpoint of ours as Lightning saved it, on the CPU, each byte checked against the file's checksum.

    Raises:
        ValueError: the file is damaged, carries code, or is not a checkpoint of this package; where another one is
            good, the message names it.
    """
    try:
        return read_strictly(Path(path))
    except ValueError as error:
        for other in newest_first({*Path(path).absolute().parent.glob("*.ckpt"), *ROOT.absolute().glob("**/*.ckpt")}):
            if other != Path(path).absolute() and is_good(other):
                raise ValueError(f"{error}. The newest good one is {os.path.relpath(other)}") from None
        raise


def facts(path: Path) -> tuple[int, float, dict] | None:
    """A checkpoint's step, its val/loss (nan without one) and the settings of the text that it was measured on.

    Weights and checksum are not read, so it takes milliseconds; None where the file says nothing of the kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > 2**24 for part in archive.infolist() if part.filename.endswith("data.pkl")):
                return None
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        data = {name: saved["datamodule_hyper_parameters"].get(name) for name in MEASURED_ON}
        return int(saved["global_step"]), float(saved.get("val_loss", math.nan)), data
    except Exception:  # whatever a damaged or hostile file makes the reader say
        return None


def is_good(path: Path) -> bool:
    with suppress(ValueError, OSError):
        return bool(read_strictly(path))
    return False


def read_strictly(path: Path) -> dict:
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the checkpoint {path} is empty")
    broken = seal_is_broken(data)
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
    if type(made_by) is not int or made_by not in (1, FORMAT, SHRUNK):
        raise ValueError(
            f"the checkpoint {path} has format {str(made_by)[:40]}, and this lightning-gpt reads up to {SHRUNK}: "
            "take a newer one"
        )
    if made_by != 1 and not data[-SEAL_SIZE:].startswith(SEAL):
        raise ValueError(f"the checkpoint {path} is damaged: its checksum is missing")
    try:
        unshrink(saved)
        refuse_contradictory(saved)
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} does not fit this version of lightning-gpt: {error}") from None
    return saved


def read_plain(data: bytes) -> Any:
    """What `torch.save` wrote, if that is plain values and dense tensors and takes no more room than `data`.

    Raises:
        Exception: of whatever kind, if it is something else.
    """
    refuse_bombs(data)
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    refuse_odd(saved, len(data))
    return saved


def unshrink(saved: dict) -> None:
    """Turn weights of one byte, as `shrink` writes them, into floating-point numbers, in place.

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


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT | Rung, Tokenizer]:
    """The net and the tokenizer of a checkpoint, ready to sample from, in float32 on `device`."""
    saved = read(path)
    sizes, weights = saved["hyper_parameters"], saved["state_dict"]
    with torch.device(device):
        net = build(sizes)
    prefix = "average." if sizes.get("ema_decay") else "net."  # the average is what was validated
    net.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
    return net.eval(), rebuild(saved["datamodule_hyper_parameters"], sizes.get("vocab_size", GPTConfig.vocab_size))


def shrink(ckpt_path: str = "best", output: str = "small.ckpt") -> None:
    """Write a checkpoint's net alone, one byte a weight: for speaking and scoring, not for going on with training.

    Each row of a matrix becomes whole numbers from -127 to 127 and a scale. `read` and all that stands on it (generate,
    score, validate) take such a file as any other.

    Args:
        ckpt_path: the checkpoint to take; best or last is the newest file of that name below checkpoints/.
        output: the file to write.
    """
    path = find(ckpt_path)
    refuse_special(Path(output))
    saved = read(path)
    prefix = "average." if saved["hyper_parameters"].get("ema_decay") else "net."
    weights, scales = {}, {}
    for name, w in saved["state_dict"].items():
        if name.startswith(prefix):
            name = "net." + name.removeprefix(prefix)
            weights[name] = w.float()
            if w.dim() == 2:
                scales[name] = w.float().abs().amax(1).clamp(min=1e-30) / 127
                weights[name] = (w.float() / scales[name][:, None]).round().to(torch.int8)
    kept = {key: value for key, value in saved.items() if key in ("epoch", "global_step", "config", VERSION)}
    kept |= {part: saved[part] for part in ("hyper_parameters", "datamodule_hyper_parameters")}
    kept["hyper_parameters"] = saved["hyper_parameters"] | {"ema_decay": 0.0}  # the average is the net now
    write(kept | {"state_dict": weights, "scales": scales}, output)
    print(f"{path} of {path.stat().st_size:,} bytes became {output} of {Path(output).stat().st_size:,}")


def weights_for(
    path: str | Path, fresh: dict[str, Tensor], tokenizer: Tokenizer | None, frozen: bool = False
) -> dict[str, Tensor]:
    """The weights of a checkpoint, its average where it has one, for a net that another text is to fine-tune.

    Characters that the checkpoint does not know keep their fresh embeddings; positions beyond the last are left out.

    Args:
        fresh: the weights of the new net, which say what shapes are wanted.
        tokenizer: of the new text; it may know more characters, and be no other in anything else.
        frozen: the embeddings are not to be trained, so there can be no new ones.
    Raises:
        ValueError: a shape or the tokenizer differs; says both. OSError: the file can't be read.
    """
    net, old = load(find(path))
    weights, same_kind = net.state_dict(), type(old) is type(tokenizer)
    words, new_words = old.vocabulary, () if tokenizer is None else tokenizer.vocabulary
    longer = isinstance(old, CharTokenizer) and same_kind and "".join(new_words).startswith("".join(words))
    if tokenizer is not None and not longer and (not same_kind or words != new_words):
        unlike = f", which lack {''.join(set(words) - set(new_words))[:40]!r}" if isinstance(old, CharTokenizer) else ""
        raise ValueError(
            f"the checkpoint {path} has the {len(old)} tokens of its {type(old).__name__}, and the text has others, "
            f"the {len(tokenizer)} of a {type(tokenizer).__name__}{unlike}: give data.vocabulary and data.tokenizer as "
            "there"
        )
    if longer and frozen and len(words) < len(new_words):
        raise ValueError(
            f"model.freeze leaves embeddings as they are, and the characters {new_words[len(words) :][:40]!r} that "
            f"{path} does not know have yet to learn theirs: take --model.freeze 0"
        )
    for name in "wte.weight", "lm_head.weight":
        if longer and len(weights[name]) < len(fresh[name]) and weights[name].shape[1:] == fresh[name].shape[1:]:
            weights[name] = torch.cat((weights[name], fresh[name][len(weights[name]) :].to(weights[name])))
    if "wpe.weight" in weights and "wpe.weight" in fresh:
        weights["wpe.weight"] = weights["wpe.weight"][: len(fresh["wpe.weight"])]
    shapes, wanted = ({name: tuple(w.shape) for name, w in part.items()} for part in (weights, fresh))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ValueError(
                f"the weights of {path} do not fit: {name} is {shapes.get(name, 'not there')} in it and "
                f"{wanted.get(name, 'not there')} here; take the sizes that it has"
            )
    return weights
