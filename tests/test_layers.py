"""The package's folders import in one direction, and the command line starts without Lightning."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gpt
from lightning_gpt.training.lightning_compat import missing_names

ROOT = Path(lightning_gpt.__file__).parent
LAYERS = "model cuda_graph data checkpoint inference training analysis alignment cli benchmarks".split()
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py", "errors.py")]


def layer(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, int]]:
    """The layers that a module imports from, with the line; absolute imports count too."""
    found, package = [], path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            targets = [(*base, *node.module.split("."))] if node.module else [(*base, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_gpt":
            targets = [tuple(node.module.split(".")[1:]) or (a.name,) for a in node.names]
        elif isinstance(node, ast.Import):
            targets = [tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("lightning_gpt.")]
        else:
            continue
        found += [(target[0], node.lineno) for target in targets]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_from_folders_to_its_left(path):
    here = LAYERS.index(layer(path.relative_to(ROOT).parts))
    for target, line in imported(path):
        if target in LAYERS:
            assert LAYERS.index(target) <= here, f"{path.name}:{line} imports {target}, which stands to the right"
        else:
            assert target in ("errors", "STARTED", "__version__"), f"{path.name}:{line} imports {target}"


def test_errors_imports_nothing_of_the_package():
    assert not imported(ROOT / "errors.py")


def test_folders_hold_modules_and_no_folders():
    assert all(len(path.relative_to(ROOT).parts) <= 2 for path in MODULES)


def test_text_is_generated_without_lightning():
    modules = "model.lecture, cuda_graph, data.corpus, checkpoint.quantize, inference.text, cli.generate, cli.main"
    code = "".join(f"import lightning_gpt.{module.strip()}; " for module in modules.split(","))
    subprocess.run([sys.executable, "-c", f"import sys; {code}sys.exit('lightning' in sys.modules)"], check=True)


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_gpt; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_imports_no_optional_package_of_torchmetrics():
    code = (
        "import sys; from lightning_gpt.cli.main import main\ntry: main(['fit', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(sorted({'torchmetrics', 'transformers', 'matplotlib'} & {*sys.modules}) != ['torchmetrics'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_private_name_of_lightning_and_jsonargparse_exists():
    """Fails with a newer version that renames one; the message says which."""
    assert not missing_names(), "\n".join(missing_names())


def test_private_names_of_lightning_are_used_in_one_module():
    names = "_trainer _should_check_val_fx _data_fetcher _batches_that_stepped _result _checkpoint_connector"
    names = {*names.split(), "_broadcast_sigterm_tensor", "_data_parallel_size", "_start_method"}
    for path in MODULES:
        used = {n.attr for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Attribute)}
        assert path.name == "lightning_compat.py" or not used & names, f"{path.name} uses {used & names}"


def test_the_public_names_are_there():
    assert all(getattr(lightning_gpt, name) for name in lightning_gpt.__all__) and lightning_gpt.__version__
