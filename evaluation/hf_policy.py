"""A checkpoint of another family than Llama, run by transformers, for the evaluation alone.

In: a Hugging Face folder with safetensors. Out: an object with the two things evaluate.py asks of a
policy: greedy continuations and log-probabilities of left-padded prefixes.
"""

from support.command import UserError
import json
from pathlib import Path

import torch
from torch import nn

from support.hub import local_folder


class HFPolicy(nn.Module):
    def __init__(self, model):
        from transformers import GenerationConfig

        super().__init__()
        self.model = model.eval()
        # else the folder's own settings, which may say to sample, fill what `greedy` leaves open
        self.model.generation_config = GenerationConfig()

    def greedy(self, prefix, pad, N: int, eos: int):
        """prefix int64 [B, P], pad int [B] -> tokens int64 [B, N], lengths int64 [B], the
        end-of-text token included."""
        B, P = prefix.shape
        how = dict(max_new_tokens=N, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        out = self.model.generate(prefix, attention_mask=real(prefix, pad), **how)
        tokens = prefix.new_full((B, N), eos)
        tokens[:, : out.shape[1] - P] = out[:, P:]
        return tokens, ((tokens == eos).cumsum(dim=1) == 0).sum(dim=1).add(1).clamp(max=N)

    def logprobs(self, prefix, pad, continuations):
        """prefix [B, P], continuations int64 [B, 1, N] -> float32 [B, 1, N]"""
        P, suffix = prefix.shape[1], continuations[:, 0]
        tokens = torch.cat((prefix, suffix), dim=1)
        mask = real(tokens, pad)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.model(tokens, attention_mask=mask, position_ids=positions).logits
        logp = torch.log_softmax(logits[:, P - 1 : -1].float(), dim=-1)
        return logp.gather(2, suffix[:, :, None]).squeeze(2)[:, None]


def real(tokens, pad):
    """1 for tokens [B, T], 0 for the `pad` paddings at their left."""
    return (torch.arange(tokens.shape[1], device=tokens.device) >= pad[:, None]).long()


def load_hf(folder: str | Path, device, refusal: UserError) -> HFPolicy:
    """The folder's model in float32. `refusal`: why it is no Llama, raised again if transformers
    does not help."""
    folder = local_folder(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UserError(f"{refusal}; for other families: pip install transformers") from None
    if config.get("model_type") in (None, "llama"):
        raise refusal
    try:
        AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: transformers can't load it either: {error}") from None
    return HFPolicy(model).to(device)
