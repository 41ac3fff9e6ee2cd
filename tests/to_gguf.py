"""A checkpoint with the pocket world's tokenizer as GGUF, by llama.cpp's own converter.

    python tests/to_gguf.py LLAMA_CPP CKPT --outtype f32 --outfile OUT.gguf

LLAMA_CPP is llama.cpp's source folder. Its convert_hf_to_gguf.py looks a tokenizer up in a list of
fingerprints, in which SmolLM2's and Llama 3's stand and the pocket world's never will. Here it is
told Llama 3's instead: on the pocket world's words and full stops that cuts at the same places, and
like ours takes a whole word unmerged.
"""

import sys

sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
convert_hf_to_gguf.main()
