"""lightning-gpt sft | reward | dpo | grpo: `fit` with another module and other data."""

from ..alignment.datamodule import DPODataModule, GRPODataModule, PreferenceDataModule, PromptDataModule
from ..alignment.dpo import DPO
from ..alignment.grpo import GRPO
from ..alignment.stages import RewardModeling, SupervisedFineTuning
from .train import CLI


class SFTCLI(CLI):
    """Supervised fine-tuning."""

    model_class, data_class = SupervisedFineTuning, PromptDataModule
    fit_description = "sft takes the options of fit: fine-tune a model on the prompts and completions of --data.corpus."


class RewardCLI(CLI):
    """The training of a reward model."""

    model_class, data_class = RewardModeling, PreferenceDataModule
    fit_description = "reward takes the options of fit: train a reward model on the pairs of --data.corpus."

    def loss_unit(self) -> str:
        return ""

    def show_result(self, path: str) -> str:
        print_metrics(self)
        return f"score --reward {path} --text_file FILE.jsonl"


class PolicyCLI(CLI):
    """The training of a policy."""

    def loss_unit(self) -> str:
        return ""

    def show_result(self, path: str) -> str:
        print_metrics(self)
        return super().show_result(path)


class DPOCLI(PolicyCLI):
    """Direct preference optimization."""

    model_class, data_class = DPO, DPODataModule
    fit_description = "dpo takes the options of fit: train a policy on the pairs of --data.corpus."


class GRPOCLI(PolicyCLI):
    """Group relative policy optimization."""

    model_class, data_class = GRPO, GRPODataModule
    fit_description = "grpo takes the options of fit: train a policy to get more of --model.reward."


STAGE_CLIS: dict[str, type[CLI]] = {"sft": SFTCLI, "reward": RewardCLI, "dpo": DPOCLI, "grpo": GRPOCLI}


def print_metrics(cli: CLI) -> None:
    """Prints what the last validation has measured."""
    metrics = {name: value for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")}
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) + "\n")
