"""A callback that logs figures of the net's activations to TensorBoard during training. Off by default."""

import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import cast

import lightning as L
import torch
from google.protobuf import text_format
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint.io import atomic_write
from ..model.gpt import GPT
from ..training.module import LanguageModel
from ..training.strategies import FSDP2Strategy

MISSING_MATPLOTLIB = "matplotlib is not installed: pip install 'tiny-lightning-gpt[plots]'"

LATEST = "latest "  # sorts before "token_embeddings"


class ModelInspector(L.Callback):
    """Logs figures of a fixed passage to TensorBoard after validation: attention of each head, loss per token,
    prediction after each layer, token embeddings (also in the projector) and similarity of positions.

    Rank 0 evaluates a copy of the validated net, so training is bit-for-bit the same with and without this callback.
    The seconds it takes are logged as `inspect/seconds`.

    Args:
        passage: the text that the net reads, cut at block_size + 1 tokens; null is the start of the validation text.
        every_n_validations: number of validations from one drawing to the next.
        shown: number of tokens in the figures of attention and of the prediction per layer.
    """

    MAX_PROJECTED = 10_000  # embeddings; the projector is slow with more

    def __init__(self, passage: str | None = None, every_n_validations: int = 1, shown: int = 16):
        for name, value in {"every_n_validations": every_n_validations, "shown": shown}.items():
            if value < 1:
                raise ValueError(f"ModelInspector's {name}={value} must be 1 or more")
        self.passage, self.every_n_validations, self.shown, self.validations = passage, every_n_validations, shown, 0

    def setup(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None:
        self.off = stage != "fit"
        if self.off:
            return
        data, block_size = trainer.datamodule, lm.hparams.block_size
        if not hasattr(data, "tokenizer"):
            raise ValueError("ModelInspector needs the tokenizer of a TextDataModule: leave it out, or train with one")
        if self.passage is None:
            ids = data.val_tokens[: block_size + 1]
        else:
            try:
                ids = data.tokenizer.encode(self.passage)
            except ValueError as error:
                raise ValueError(f"ModelInspector's passage: {error}") from None
            if len(ids) < 2:
                raise ValueError(f"ModelInspector's passage {self.passage!r} is too short: give at least two tokens")
        self.ids = torch.as_tensor(ids[: block_size + 1]).long()
        reason = None
        if isinstance(trainer.strategy, FSDP2Strategy):
            reason = "no device holds the full net under strategy=fsdp2"
        elif lm.hparams.lecture_step:
            reason = f"they need a GPT, and this net is lecture_step={lm.hparams.lecture_step}"
        elif not self.tensorboard_logger(trainer):
            reason = "they go to TensorBoard, and this run has no TensorBoardLogger"
        else:
            try:
                import lightning_gpt.analysis.figures  # noqa: F401
            except ImportError:
                reason = MISSING_MATPLOTLIB
        if reason and not trainer.fast_dev_run:
            lm.print(f"ModelInspector draws no figures: {reason}")
        self.off = reason is not None or not trainer.is_global_zero

    @staticmethod
    def tensorboard_logger(trainer: L.Trainer) -> TensorBoardLogger | None:
        return next((log for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None)

    def on_validation_end(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if self.off or trainer.sanity_checking or not trainer.callback_metrics["val/loss"].isfinite():
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        try:
            self.draw(trainer, cast(LanguageModel, lm))
        except Exception as error:  # a failure in matplotlib or on the disk must not stop training
            reason = str(error).split("\n")[0][:200]
            print(f"warning: ModelInspector has no figures of step {trainer.global_step:,}: {reason}", file=sys.stderr)

    def draw(self, trainer: L.Trainer, lm: LanguageModel) -> None:
        from .figures import figures
        from .probes import token_label

        start, step = time.perf_counter(), trainer.global_step - 1  # Lightning logs steps from 0
        logger, tokenizer = cast(TensorBoardLogger, self.tensorboard_logger(trainer)), trainer.datamodule.tokenizer
        net = deepcopy(cast(GPT, lm.eval_net)).eval()  # a copy is not compiled, and its hooks do not affect training
        net = net if net.wte.weight.dtype == torch.float64 else net.float()
        for name, figure in figures(net, tokenizer, self.ids.to(lm.device), self.shown, narrow=True):
            logger.experiment.add_figure(f"inspect/{name}", figure, step)
        embeddings = net.wte.weight.detach()[: self.MAX_PROJECTED].float()
        labels = [token_label(tokenizer, i) for i in range(len(embeddings))]
        self.restore_projector_config(logger.experiment, step)
        logger.experiment.add_embedding(embeddings, labels, tag="token_embeddings", global_step=step)
        self.rename_latest(logger.experiment)
        logger.log_metrics({"inspect/seconds": time.perf_counter() - start}, step)

    @staticmethod
    def restore_projector_config(writer: SummaryWriter, step: int) -> None:
        """Lists the embeddings of earlier steps again in a resumed run, where SummaryWriter would list only its own."""
        path = Path(writer.log_dir, "projector_config.pbtxt")
        if not hasattr(writer, "_projector_config") and path.exists():
            listed = text_format.Parse(path.read_text(encoding="utf-8"), ProjectorConfig()).embeddings
            earlier = [entry for entry in listed if embedding_step(entry) < step]
            writer._projector_config = ProjectorConfig(embeddings=earlier)

    @staticmethod
    def rename_latest(writer: SummaryWriter) -> None:
        """The projector opens the embedding whose name sorts first, which would be the oldest."""
        config = writer._projector_config
        latest = max(map(embedding_step, config.embeddings))
        for entry in config.embeddings:
            name = entry.tensor_name.removeprefix(LATEST)
            entry.tensor_name = LATEST + name if embedding_step(entry) == latest else name
        path = Path(writer.log_dir, "projector_config.pbtxt")
        atomic_write(path, text_format.MessageToString(config).encode())


def embedding_step(entry: EmbeddingInfo) -> int:
    return int(entry.tensor_name.rsplit(":", 1)[1])
