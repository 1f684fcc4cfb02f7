"""Every logger gets the metrics and samples of a run, in the run's folder, and a resumed run continues them."""

import csv
import json
import shutil
import sys

import pytest
import torch
from conftest import TINY
from test_cli import scalars

from lightning_gpt.cli.main import main
from lightning_gpt.training.logger import RunCSVLogger


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curves(rows):
    """The (step, value) pairs of each column, as `scalars` gives them."""
    names = set(rows[0]) - {"step", "epoch"}
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}


def test_metrics_csv_has_the_values_of_tensorboard_and_survives_a_resume(tmp_path, text_file, capsys):
    where = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=2",
    ]
    main(["fit", *TINY, "--config=csv", f"--data.corpus={text_file}", *where, "--trainer.max_steps=4"])
    run = tmp_path / "tiny" / "version_0"
    last, table = run / "checkpoints" / "last.ckpt", run / "metrics.csv"
    shutil.copy(last, tmp_path)
    resume = ["fit", f"--ckpt_path={last}", *where, "--trainer.max_steps=6"]
    main(resume)
    first = table.read_text()
    shutil.copy(tmp_path / "last.ckpt", last)  # as if the process had been killed before it saved step 6
    main([*resume, "--config=csv"])  # given again, it is not added twice
    values, _ = scalars(run)
    logged = curves(read_csv(table))
    assert [step for step, _ in logged["train/loss"]] == list(range(6))  # every step once
    assert [step for step, _ in logged["val/loss"]] == [1, 3, 5]
    assert set(logged) == set(values) - {"perf/tokens_per_second", "perf/ms_per_step"}
    for name, curve in logged.items():
        assert [value for _, value in curve] == pytest.approx([value for _, value in values[name]], rel=1e-6)
    assert (run / "metrics_before_step_4.csv").read_text() == first  # nothing that was logged is lost
    assert len(list(run.glob("metrics*"))) == 2


def test_new_columns_and_a_full_disk_lose_no_row(tmp_path, capsys):
    logger, table = RunCSVLogger(), tmp_path / "metrics.csv"
    logger.folder = tmp_path
    table.symlink_to("/dev/full")
    logger.log_metrics({"loss": 3.0}, 0)
    logger.save()
    logger.save()
    assert capsys.readouterr().err.count("No space left on device. Training continues") == 1
    table.unlink()
    for step, metrics in enumerate([{"loss": 2.0}, {"best": 1.5}, {"loss": 1.0, "best": 1.0}], start=1):
        logger.log_metrics(metrics, step)
        logger.save()
    columns = {"loss": [(0, 3.0), (1, 2.0), (3, 1.0)], "best": [(2, 1.5), (3, 1.0)]}
    assert curves(read_csv(table)) == columns


@pytest.mark.slow
def test_wandb_gets_metrics_and_samples_and_a_resumed_run_continues_its_run(tmp_path, text_file, run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    where = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", *TINY, "--config=wandb", f"--data.corpus={text_file}", where])
    mine = tmp_path / "tiny" / "version_0"
    (folder,) = mine.glob("wandb/offline-run-*")
    (table,) = folder.glob("files/media/table/*.json")
    table = json.loads(table.read_text())
    _, board = scalars(mine)
    assert table["columns"] == ["prompt", "text", "copied"]
    for prompt, text, copied in table["data"]:
        (event,) = board.Tensors("samples/" + prompt.replace("\n", "↵") + "/text_summary")
        logged = event.tensor_proto.string_val[0].decode()
        assert text.startswith(prompt) and text in logged and copied in logged
    states = [torch.load(one / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for one in (run, mine)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # training is the same
    main(["fit", f"--ckpt_path={mine}/checkpoints/last.ckpt", where, "--trainer.max_steps=6"])
    runs = [path.name for path in mine.glob("wandb/offline-run-*")]
    assert len(runs) == 2 and len({name.rsplit("-", 1)[1] for name in runs}) == 1


def test_without_wandb_one_sentence_says_what_to_install(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = fails("fit", *TINY, "--config=wandb", f"--trainer.default_root_dir={tmp_path}")
    assert error.endswith("wandb, which is not installed: pip install 'tiny-lightning-gpt[wandb]'")


def test_a_run_whose_logger_cannot_start_leaves_no_folder(monkeypatch, tmp_path, text_file, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--config=wandb", f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("lightning-gpt: error: W&B can't start: ")
    assert not list((tmp_path / "tiny").iterdir())
