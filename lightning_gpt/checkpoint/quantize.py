"""int8 checkpoints: matrices in int8 with one scale per row."""

from pathlib import Path

from ..model.int8 import quantize_rows
from .io import check_regular_file, find_checkpoint, read_checkpoint, write_checkpoint
from .validation import VERSION_KEY


def quantize(ckpt_path: str = "best", output: str = "small.ckpt") -> None:
    """Write a checkpoint's net in int8, without the optimizer's state: to generate and score, not to resume training.

    Each matrix is stored as int8 values with one float32 scale per row. `generate`, `score` and `validate` read such
    files as any other checkpoint.

    Args:
        ckpt_path: the checkpoint to quantize; best or last is the newest file of that name below checkpoints/.
        output: the file to write.
    """
    path = find_checkpoint(ckpt_path)
    check_regular_file(Path(output))
    checkpoint = read_checkpoint(path)
    prefix = "ema_net." if checkpoint["hyper_parameters"]["ema_decay"] else "net."
    weights, scales = {}, {}
    for name, w in checkpoint["state_dict"].items():
        if name.startswith(prefix):
            name = "net." + name.removeprefix(prefix)
            weights[name] = w.float()
            if w.dim() == 2:
                weights[name], scales[name] = quantize_rows(w)
    keys = "epoch", "global_step", "config", "stage", VERSION_KEY
    kept = {key: value for key, value in checkpoint.items() if key in keys}
    kept["datamodule_hyper_parameters"] = checkpoint["datamodule_hyper_parameters"]
    kept["hyper_parameters"] = checkpoint["hyper_parameters"] | {"ema_decay": 0.0}  # the average is the only net now
    write_checkpoint(kept | {"state_dict": weights, "scales": scales}, output)
    print(f"{path} of {path.stat().st_size:,} bytes became {output} of {Path(output).stat().st_size:,}")
