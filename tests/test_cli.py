"""The command line as a user sees it: the files of a run, settings from checkpoints, errors for bad input."""

import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from lightning_gpt import __version__
from lightning_gpt.checkpoint.io import find_checkpoint, load_net, write_checkpoint
from lightning_gpt.cli.config import CONFIGS
from lightning_gpt.cli.main import main
from lightning_gpt.training.optim import lr_factor


def scalars(run):
    board = EventAccumulator(str(run)).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}, board


def test_a_run_is_one_folder_and_ends_with_a_validation_and_a_checkpoint(run):
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    values, board = scalars(run)
    assert [step for step, _ in values["val/loss"]] == [4]  # after the fifth step, though val_check_interval is larger
    assert {"settings/config/text_summary", "settings/hardware/text_summary"} < set(board.Tags()["tensors"])
    assert any(tag.startswith("samples/") for tag in board.Tags()["tensors"])
    (layout,) = board.Tensors("custom_scalars__config__")
    charts = layout.tensor_proto.string_val[0]
    assert b"tokens per second" in charts and (b"GPU" in charts) == torch.cuda.is_available()  # no chart without data


def test_best_has_the_lowest_loss_and_last_is_the_newest(tmp_path, text_file):
    flags = ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1", "--model.learning_rate", "0.5"]
    main(
        [
            "fit",
            *TINY,
            *flags,
            "--trainer.max_steps=9",
            f"--data.corpus={text_file}",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    run = tmp_path / "tiny" / "version_0"
    values, _ = scalars(run)
    assert [step for step, _ in values["val/loss"]] == [1, 3, 5, 7, 8]  # steps are counted from 0
    best_step, best = min(values["val/loss"], key=lambda pair: pair[1])
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best_step + 1
    for tag in "train/loss", "train/lr", "train/grad_norm":
        assert len(values[tag]) == 9
    assert [step for step, _ in values["perf/tokens_per_second"]] == [5, 6, 7, 8]  # the first steps are warm-up
    assert {"val/bpc", "val/perplexity"} <= set(values)


def test_validate_needs_only_a_checkpoint(ckpt, run, capsys):
    main(["validate", "--ckpt_path", str(ckpt)])
    loss = scalars(run)[0]["val/loss"][-1][1]
    assert f"{loss:.5f}"[:-1] in capsys.readouterr().out


def test_validate_takes_windows_that_are_shorter_than_in_training(ckpt, text_file, capsys, fails):
    main(["validate", f"--ckpt_path={ckpt}", "--model.block_size=5"])
    loss = float(re.search(r"val/loss[^\w\n]+([\d.]+)", capsys.readouterr().out).group(1))
    net, tokenizer = load_net(ckpt)
    text = text_file.read_text()
    ids = tokenizer.encode(text[int(0.9 * len(text)) :])
    windows = zip(ids[:-1].split(5), ids[1:].split(5), strict=True)
    losses = [F.cross_entropy(net(x[None])[0], y, reduction="none") for x, y in windows]
    assert torch.cat(losses).mean().item() == pytest.approx(loss, abs=1e-5)
    for size in 0, 1000:
        assert f"block_size={size} contradicts" in fails(
            "validate", f"--ckpt_path={ckpt}", f"--model.block_size={size}"
        )


def test_the_process_ends_with_its_output_and_exit_functions():
    code = "import atexit, sys; from lightning_gpt.cli.main import main; atexit.register(print, 'exit'); main()"
    for args, status in (["--version"], 0), (["nonsense"], 2):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == status
        assert done.stdout.split("\n")[-2:] == ["exit", ""] and (status or __version__ in done.stdout)


def test_training_imports_no_package_that_torchmetrics_could_use(tmp_path):
    for name in "matplotlib", "scipy", "transformers":
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported ' + __name__)")
    command = [sys.executable, "-m", "lightning_gpt", "fit", "--config", "laptop", "--print_config"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_a_run_can_be_repeated_from_its_config(run, tmp_path):
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)])
    first, again = (scalars(folder)[0]["val/loss"] for folder in (run, tmp_path / "tiny" / "version_0"))
    assert first == again


def test_fit_resumes_from_a_checkpoint_with_its_settings(run, tmp_path):
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    main(["fit", f"--ckpt_path={last}", "--trainer.max_steps=7", f"--trainer.default_root_dir={tmp_path}"])
    values, _ = scalars(tmp_path / "tiny" / "version_0")
    assert [step for step, _ in values["val/loss"]] == [6]
    assert last.read_bytes() == before


def run_generate(capsys, *args):
    capsys.readouterr()
    main(["generate", *map(str, args)])
    return capsys.readouterr().out


def test_generate_is_reproducible_and_stays_in_the_vocabulary(ckpt, text_file, capsys):
    args = ["--ckpt_path", ckpt, "--prompt", "the cat", "--max_new_tokens", 40]
    one, same, other = (run_generate(capsys, *args, "--seed", seed) for seed in (7, 7, 8))
    assert one == same != other
    assert one.startswith("the cat") and len(one) == len("the cat") + 40 + 1
    assert set(one) <= set(text_file.read_text()) | {"\n"}
    samples = run_generate(capsys, *args, "--seed", 7, "--num_samples", 3).split("\n" + "-" * 40 + "\n")
    assert len({*samples}) == 3 and samples[0] + "\n" == one


def test_without_a_path_the_newest_best_checkpoint_is_taken(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "checkpoints" / "some" / "version_0")
    monkeypatch.chdir(tmp_path)
    assert run_generate(capsys, "--prompt", "the", "--max_new_tokens", 3).startswith("the")


NAMES = {f"{path.relative_to(CONFIGS).with_suffix('')}" for path in CONFIGS.glob("**/*.yaml")}


@pytest.mark.parametrize("name", sorted(NAMES - {"sft", "reward", "dpo", "grpo"}))  # these are of other commands
def test_every_config_takes_a_step(name, tmp_path, token_files, text_file, ckpt, capsys):
    small = "--trainer.fast_dev_run=true --data.batch_size=2 --sample.length=5 --data.name_augmentation=0".split()
    small += "--trainer.accelerator=cpu --trainer.devices=1 --trainer.precision=32-true --model.compile=false".split()
    if name == "gpt2":
        small += [f"--data.token_files={token_files}", "--model.n_layer=1", "--model.n_embd=48"]
        small += ["--trainer.accumulate_grad_batches=1"]
    if name == "finetune":
        small += [f"--model.init_from={ckpt}", f"--data.corpus={text_file}"]
    main(["fit", f"--config={name}", *small, "--trainer.strategy=auto", f"--trainer.default_root_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_later_configs_and_flags_override_earlier_ones(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: {n_layer: 3}")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=laptop", f"--config={tmp_path}/mine.yaml", "--model.dropout=0.3", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0
    assert (config["model"]["n_layer"], config["model"]["dropout"], config["name"]) == (3, 0.3, "laptop")


def test_output_to_a_file_is_plain_lines(tmp_path, text_file, capsys):
    main(["fit", *TINY, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    captured = capsys.readouterr()
    assert captured.err == "" and "\r" not in captured.out and "\x1b" not in captured.out
    assert "step 5/5" in captured.out and "best.ckpt" in captured.out and " generate\n" in captured.out


def test_the_test_command_prints_the_same_metrics_as_validate(ckpt, capsys):
    figures = []
    for command in "validate", "test":
        capsys.readouterr()
        main([command, "--ckpt_path", str(ckpt)])
        figures.append(re.findall(r"/(\w+)[^\w\n]+([\d.]+)", capsys.readouterr().out))
    assert len(figures[0]) == 3 and figures[0] == figures[1]


def test_logged_learning_rates_and_losses_are_right(tmp_path, text_file):
    flags = ["--trainer.log_every_n_steps=1", "--model.warmup_steps=2", "--model.learning_rate=0.01"]
    main(["fit", *TINY, *flags, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    values, _ = scalars(tmp_path / "tiny" / "version_0")
    rates = [0.01 * lr_factor(k, 5, 2, "cosine", 0.1, 0.6) for k in range(5)]
    assert [value for _, value in values["train/lr"]] == pytest.approx(rates)
    assert values["train/loss"][0][1] == pytest.approx(math.log(32), abs=0.1)  # uniform predictions at first


class InterruptAtStep4(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_saves_its_last_finished_step(tmp_path, text_file):
    flags = ["--save_every_n_steps=2", f"--trainer.callbacks=[{{class_path: {__name__}.InterruptAtStep4}}]"]
    with pytest.raises(SystemExit):
        main(["fit", *TINY, *flags, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    assert torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["global_step"] == 3


def test_seed_and_precision_are_taken_from_the_checkpoint(tmp_path, text_file, capsys):
    flags = ["--seed_everything=5", "--trainer.precision=bf16-true", f"--data.corpus={text_file}"]
    main(["fit", *TINY, *flags, f"--trainer.default_root_dir={tmp_path}"])
    run = tmp_path / "tiny" / "version_0"
    capsys.readouterr()
    main(["validate", f"--ckpt_path={run}/checkpoints/best.ckpt"])
    loss = scalars(run)[0]["val/loss"][-1][1]
    assert re.search(r"val/loss[^\w\n]+([\d.]+)", capsys.readouterr().out).group(1)[:8] == f"{loss:.12f}"[:8]
    again = ["--trainer.max_steps=6", f"--trainer.default_root_dir={tmp_path}/again"]
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", *again])
    checkpoint = torch.load(next((tmp_path / "again").rglob("last.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["seed"] == checkpoint["datamodule_hyper_parameters"]["seed"] == 5


def test_the_sampling_flags_of_generate_take_effect(ckpt, capsys):
    args = ["--ckpt_path", ckpt, "--prompt", "the cat", "--max_new_tokens", 40]
    usual, likeliest = run_generate(capsys, *args), run_generate(capsys, *args, "--temperature", 0)
    assert usual != likeliest == run_generate(capsys, *args, "--top_k", 1)


def test_find_checkpoint_takes_the_newest(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path := tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(["b", "c", "a"]):
        (tmp_path / name).mkdir()
        shutil.copy(ckpt, tmp_path / name / "best.ckpt")
        os.utime(tmp_path / name / "best.ckpt", (1000 - age, 1000 - age))
    assert find_checkpoint("best") == Path("checkpoints/b/best.ckpt")


def test_every_sample_prompt_is_continued(tmp_path, text_file):
    flags = ["--sample.prompts=[the cat, who, sat]", "--trainer.log_every_n_steps=1"]
    main(["fit", *TINY, *flags, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    values, board = scalars(tmp_path / "tiny" / "version_0")
    for prompt in "the cat", "who", "sat":
        shown = board.Tensors(f"samples/{prompt}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert shown.startswith(f"```\n{prompt}")


def test_a_resumed_run_can_change_dropout(run, tmp_path):
    flags = ["--model.dropout=0.5", "--trainer.max_steps=6", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", *flags])
    assert torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["hyper_parameters"]["dropout"] == 0.5


def test_a_resumed_run_can_change_weight_decay_and_betas(run, tmp_path):
    flags = ["--model.betas=[0.8,0.9]", "--model.weight_decay=0.3", "--trainer.max_steps=6"]
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", *flags, f"--trainer.default_root_dir={tmp_path}"])
    for path, decay, betas in (run, 0.1, (0.9, 0.99)), (tmp_path, 0.3, (0.8, 0.9)):
        checkpoint = torch.load(next(path.rglob("last.ckpt")), weights_only=True)
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        assert [(g["weight_decay"], tuple(g["betas"])) for g in groups] == [(decay, betas), (0.0, betas)]


def test_a_text_without_newlines_can_be_trained_on_and_generated_from(tmp_path, capsys):
    text = write_file(tmp_path, b"ab ac ad " * 100)
    main(["fit", *TINY, f"--data.corpus={text}", f"--trainer.default_root_dir={tmp_path}/run"])
    assert "best.ckpt" in capsys.readouterr().out
    best = next(tmp_path.rglob("best.ckpt"))
    assert set(run_generate(capsys, "--ckpt_path", best, "--max_new_tokens", 9)) <= set(" abcd\n")


def test_a_run_without_checkpoints_or_validation_succeeds(tmp_path, text_file, capsys):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, *paths, "--trainer.enable_checkpointing=false"])
    assert not list(tmp_path.rglob("*.ckpt"))
    main(["fit", *TINY, *paths, "--trainer.limit_val_batches=0"])
    assert "last.ckpt" in capsys.readouterr().out.splitlines()[-1]


def test_a_closed_output_pipe_ends_generation_without_an_error(ckpt):
    command = f"{sys.executable} -m lightning_gpt generate --ckpt_path {ckpt} --max_new_tokens 3000 | head -c 20"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(done.stdout) == 20 and done.stderr.count("\n") == 1 and "val/loss" in done.stderr


# --- bad input --------------------------------------------------------------------------------------------------------


def write_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"text \xff\xfe more", "not UTF-8 text: byte 0xff at offset 5"),
        (b"ab\0cd" * 100, "zero byte at offset 2"),
        (b"too short for a window", "too few for one window of block_size=16"),
        (b"validation split is shorter than a window" * 3, "the validation split has 13"),
    ],
)
def test_an_unusable_corpus_is_refused(tmp_path, fails, content, message):
    path = tmp_path / "none" if content is None else write_file(tmp_path, content)
    assert message in fails("fit", *TINY, f"--data.corpus={path}", f"--trainer.default_root_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.n_head=3"], "n_embd=16 is not divisible by n_head=3"),
        (["--model.block_size=100000"], "too few for one window of block_size=100000"),
        (["--model.n_layer=-1"], "n_layer=-1 must be at least 0"),
        (["--model.dropout=1.5"], "dropout=1.5 is a probability"),
        (["--model.layers=3"], "--model.layers"),
        (["--model.activation=swish"], "gelu"),
        (["--data.split=1.5"], "data.split=1.5"),
        (["--data.batch_size=0"], "data.batch_size=0"),
        (["--config=nowhere.yaml"], "laptop, lecture/bigram"),
        (["--trainer.max_steps=-1"], "trainer.max_steps=-1"),
        (["--sample.prompts=['a €']"], "'€'"),
        (["--sample.temperature=-1"], "temperature=-1.0"),
        (["--sample.length=-3"], "sample.length=-3"),
        (["--model.warmup_steps=-5"], "warmup_steps=-5"),
        (["--model.min_lr_ratio=7"], "min_lr_ratio=7.0"),
        (["--model.ema_decay=1"], "ema_decay=1.0"),
        (["--save_every_n_steps=-1"], "save_every_n_steps=-1"),
        (["--name=../../out"], "name='../../out'"),
        (["--seed_everything=true"], "seed_everything=True"),
        (["--seed_everything=-5"], "seed_everything=-5"),
        (["--data.split=[0.9,0.8]"], "data.split=(0.9, 0.8)"),
        (["--model.position=rope", "--model.n_embd=18"], "every head an odd number, 9"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, fails, flags, message, text_file):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    assert message in fails("fit", *TINY, *paths, *flags)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_refused(fails, tmp_path, accelerator):
    error = fails("fit", f"--trainer.accelerator={accelerator}", f"--trainer.default_root_dir={tmp_path}")
    assert f"trainer.accelerator={accelerator}" in error and "cpu" in error


def test_an_unknown_key_in_a_config_is_refused(fails, tmp_path):
    assert "n_layers" in fails("fit", "--config", write_file(tmp_path, b"model: {n_layers: 3}"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=the € ¥"], "'¥€'"),
        (["--top_p=0"], "top_p=0.0"),
        (["--min_p=2"], "min_p=2.0"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0"),
        (["--context_shift=17"], "context_shift=17 must be between 1 and block_size=16"),
        (["--stop=['']"], "stop has an empty string"),
        (["--prompt_file=x.txt"], "not both"),
        (["--output=nowhere/x.txt"], "output=nowhere/x.txt"),
        (["--interactive=true", "--json=true"], "interactive"),
        (["--precision=int3"], "precision"),
        (["--temperature=-1"], "temperature=-1.0"),
        (["--top_k=0"], "top_k=0"),
        (["--max_new_tokens=0"], "max_new_tokens=0"),
        (["--num_samples=0"], "num_samples=0"),
        (["--device=abacus"], "device=abacus"),
        (["--tempo=3"], "tempo"),
    ],
)
def test_invalid_options_of_generate_are_refused(ckpt, fails, flags, message):
    assert message in fails("generate", "--ckpt_path", ckpt, "--prompt=the", *flags)


def test_resuming_a_finished_run_is_refused(run, fails):
    assert "max_steps=5 leaves nothing to do" in fails("fit", "--ckpt_path", run / "checkpoints" / "last.ckpt")


def test_a_flag_that_contradicts_the_checkpoint_is_an_error(ckpt, run, fails):
    assert "model.n_layer=2 contradicts" in fails("validate", "--ckpt_path", ckpt, "--model.n_layer=2")
    assert "data.split=0.5 contradicts" in fails("validate", "--ckpt_path", ckpt, "--data.split=0.5")
    assert "model.n_embd=32 contradicts" in fails("fit", "--ckpt_path", ckpt, "--model.n_embd=32")


class RunsCode:
    def __reduce__(self):
        return (Path.write_text, (Path("bomb"), "it ran"))


@pytest.mark.parametrize("command", ["generate", "validate", "fit"])
def test_a_bad_checkpoint_is_refused_and_runs_no_code(command, ckpt, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = ckpt.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save({"state_dict": RunsCode(), "hyper_parameters": {}, "datamodule_hyper_parameters": {}}, "hostile.ckpt")
    Path("pickle.ckpt").write_bytes(pickle.dumps(RunsCode()))
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("hello", "there")
    Path("folder.ckpt").mkdir()
    for name, content in {"empty": b"", "text": b"hello", "cut": good[: len(good) // 2], "flipped": flipped}.items():
        Path(f"{name}.ckpt").write_bytes(content)
    for path in sorted(Path().glob("*.ckpt")):
        assert str(path) in fails(command, "--ckpt_path", path)
    assert not Path("bomb").exists()


def test_a_checkpoint_cannot_import_classes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evil.py").write_text("from lightning import Callback\nopen('bomb', 'w')\nclass Evil(Callback): ...")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    config = yaml.safe_load(checkpoint["config"])
    config["trainer"] |= {
        "callbacks": [{"class_path": "evil.Evil"}],
        "profiler": "evil.Evil",
        "strategy": {"class_path": "evil.Evil"},
        "default_root_dir": str(tmp_path / "elsewhere"),
    }
    write_checkpoint(checkpoint | {"config": yaml.safe_dump(config)}, "hostile.ckpt")
    main(["fit", "--ckpt_path=hostile.ckpt", "--trainer.max_steps=6"])
    main(["validate", "--ckpt_path=hostile.ckpt"])
    assert Path("checkpoints/tiny/version_0").exists()
    assert not Path("bomb").exists() and not Path("elsewhere").exists()


def test_a_checkpoint_that_names_a_folder_elsewhere_is_refused(run, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    write_checkpoint(
        checkpoint | {"config": checkpoint["config"].replace("name: tiny", "name: ../out")}, "hostile.ckpt"
    )
    assert "name='../out'" in fails("fit", "--ckpt_path=hostile.ckpt", "--trainer.max_steps=6")


def test_a_checkpoint_describes_itself(ckpt, text_file):
    net, tokenizer = load_net(ckpt)
    assert tokenizer.vocabulary == "".join(sorted(set(text_file.read_text())))
    assert net.config.block_size == 16 and not net.training


def test_a_run_on_token_files_can_be_resumed_validated_and_sampled(tmp_path, token_files, capsys):
    root, data = (
        f"--trainer.default_root_dir={tmp_path}",
        ["--data.token_files", token_files, "--data.vocab_size", "300"],
    )
    main(["fit", *TINY, root, *data])
    (best,) = tmp_path.rglob("best.ckpt")
    main(["fit", f"--ckpt_path={best.with_name('last.ckpt')}", "--trainer.max_steps=7"])
    capsys.readouterr()
    main(["validate", f"--ckpt_path={best}"])
    assert "val/loss" in capsys.readouterr().out
    main(["generate", f"--ckpt_path={best}", "--prompt", "5 6", "--max_new_tokens", "4"])
    assert len(capsys.readouterr().out.split()) == 6
