"""Load a tokenizer from a local folder; Python code that it brings runs only if that is asked for."""

from pathlib import Path
from typing import Any

from mtrl.parallel.errors import ModelError


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a Hugging Face folder, as transformers loads it.

    Raises:
        ModelError: there is none, it cannot be read, it is Python code (``auto_map``) that nobody asked to
            run, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"no tokenizer at {folder}; set model.tokenizer to a folder with tokenizer.json")
    try:
        # Given even where it is false: left out, transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer at {folder} is Python code (auto_map), which is not run; read it, then set "
                "model.trust_remote_code=true, or give one with tokenizer.json in model.tokenizer"
            ) from error
        raise ModelError(f"the tokenizer at {folder} cannot be read: {error}; download it again") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer at {folder} has no eos_token, so completions could not end")
    return tokenizer
