"""A callback that draws what happens inside the net while it trains. Off unless it is asked for."""

import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import cast

import lightning as L
import torch
from google.protobuf import text_format
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch.utils.tensorboard import SummaryWriter

from ..model.gpt import GPT
from ..training.module import LanguageModel
from ..training.strategies import FSDP2Strategy

MISSING_MATPLOTLIB = "matplotlib, which draws them, is not here: pip install 'tiny-lightning-gpt[plots]'"


class ModelInspector(L.Callback):
    """After validations, figures of a fixed passage in TensorBoard: attention of each head, the loss at each character,
    the prediction after each layer, the token embeddings (in the projector too) and how alike positions are.

    Rank 0 looks at a copy of the net that is validated, so training is bit for bit the same with and without it. The
    time that it takes is logged as `inspect/seconds`.

    Args:
        passage: the text that the net reads; null takes the validation text's beginning. What is beyond block_size is
            left out.
        every_n_validations: draw after so many of them.
        shown: of how many characters attention and prediction per layer are drawn.
    """

    PROJECTED = 10_000  # embeddings, at most; the projector gets slow with more

    def __init__(self, passage: str | None = None, every_n_validations: int = 1, shown: int = 32):
        for name, value in {"every_n_validations": every_n_validations, "shown": shown}.items():
            if value < 1:
                raise ValueError(f"ModelInspector's {name}={value} must be 1 or more")
        self.passage, self.every_n_validations, self.shown, self.validations = passage, every_n_validations, shown, 0

    def setup(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None:
        self.off = stage != "fit"
        if self.off:
            return
        data, block_size = trainer.datamodule, lm.hparams.block_size
        if self.passage is None:
            ids = data.val_tokens[: block_size + 1]
        else:
            try:
                ids = data.tokenizer.encode(self.passage)
            except ValueError as error:
                raise ValueError(f"ModelInspector's passage: {error}") from None
            if len(ids) < 2:
                raise ValueError(
                    f"ModelInspector's passage {self.passage!r} is too short: give two characters at least"
                )
        self.ids = torch.as_tensor(ids[: block_size + 1]).long()
        reason = None
        if isinstance(trainer.strategy, FSDP2Strategy):
            reason = "no device has the whole net under strategy=fsdp2"
        elif lm.hparams.lecture_step:
            reason = f"they are of a GPT, and this is the lecture's lecture_step {lm.hparams.lecture_step}"
        elif not self.board(trainer):
            reason = "they go to TensorBoard, and this run has no such logger"
        else:
            try:
                import lightning_gpt.analysis.figures  # noqa: F401
            except ImportError:
                reason = MISSING_MATPLOTLIB
        if reason and not trainer.fast_dev_run:
            lm.print(f"ModelInspector draws no figures: {reason}")
        self.off = reason is not None or not trainer.is_global_zero

    @staticmethod
    def board(trainer: L.Trainer) -> TensorBoardLogger | None:
        return next((log for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None)

    def on_validation_end(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if self.off or trainer.sanity_checking or not trainer.callback_metrics["val/loss"].isfinite():
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        try:
            self.draw(trainer, cast(LanguageModel, lm))
        except Exception as error:  # whatever matplotlib or the disk says; a figure is not worth a run
            reason = str(error).split("\n")[0][:200]
            print(f"warning: ModelInspector has no figures of step {trainer.global_step:,}: {reason}", file=sys.stderr)

    def draw(self, trainer: L.Trainer, lm: LanguageModel) -> None:
        from .figures import figures
        from .probes import token_label

        since, step = time.perf_counter(), trainer.global_step - 1  # Lightning counts the steps it logs from 0
        board, tokenizer = cast(TensorBoardLogger, self.board(trainer)), trainer.datamodule.tokenizer
        net = deepcopy(cast(GPT, lm.eval_net)).eval()  # a copy is uncompiled, and hooks on it trouble nobody
        net = net if net.wte.weight.dtype == torch.float64 else net.float()
        for name, figure in figures(net, tokenizer, self.ids.to(lm.device), self.shown):
            board.experiment.add_figure(f"inspect/{name}", figure, step)
        few = net.wte.weight.detach()[: self.PROJECTED].float()
        names = [token_label(tokenizer, i) for i in range(len(few))]
        self.keep_projected(board.experiment, step)
        board.experiment.add_embedding(few, names, tag="token_embeddings", global_step=step)
        board.log_metrics({"inspect/seconds": time.perf_counter() - since}, step)

    @staticmethod
    def keep_projected(writer: SummaryWriter, step: int) -> None:
        """A run that goes on shows the embeddings of its earlier steps too; SummaryWriter lists those of its own."""
        listed = Path(writer.log_dir, "projector_config.pbtxt")
        if not hasattr(writer, "_projector_config") and listed.exists():
            before = text_format.Parse(listed.read_text(encoding="utf-8"), ProjectorConfig()).embeddings
            earlier = [one for one in before if int(one.tensor_name.rsplit(":", 1)[1]) < step]
            writer._projector_config = ProjectorConfig(embeddings=earlier)
