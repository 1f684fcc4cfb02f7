"""int8 checkpoints: one byte per weight and a scale per row."""

from pathlib import Path

import torch

from .io import check_regular_file, find_checkpoint, read_checkpoint, write_checkpoint
from .validation import VERSION_KEY


def quantize(ckpt_path: str = "best", output: str = "small.ckpt") -> None:
    """Write a checkpoint's net alone, one byte a weight: for speaking and scoring, not for going on with training.

    Each row of a matrix becomes int8 values and one scale. `generate`, `score` and `validate` read such a file like any
    other.

    Args:
        ckpt_path: the checkpoint to take; best or last is the newest file of that name below checkpoints/.
        output: the file to write.
    """
    path = find_checkpoint(ckpt_path)
    check_regular_file(Path(output))
    saved = read_checkpoint(path)
    prefix = "ema_net." if saved["hyper_parameters"].get("ema_decay") else "net."
    weights, scales = {}, {}
    for name, w in saved["state_dict"].items():
        if name.startswith(prefix):
            name = "net." + name.removeprefix(prefix)
            weights[name] = w.float()
            if w.dim() == 2:
                scales[name] = w.float().abs().amax(1).clamp(min=1e-30) / 127
                weights[name] = (w.float() / scales[name][:, None]).round().to(torch.int8)
    kept = {key: value for key, value in saved.items() if key in ("epoch", "global_step", "config", VERSION_KEY)}
    kept |= {part: saved[part] for part in ("hyper_parameters", "datamodule_hyper_parameters")}
    kept["hyper_parameters"] = saved["hyper_parameters"] | {"ema_decay": 0.0}  # the average is the net now
    write_checkpoint(kept | {"state_dict": weights, "scales": scales}, output)
    print(f"{path} of {path.stat().st_size:,} bytes became {output} of {Path(output).stat().st_size:,}")
