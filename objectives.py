"""The objectives, as pure functions of tensors.

In: rewards [B, C] (nan where a judge gave no verdict) and log-probabilities of the candidates.
Out: which candidates to learn from, and a loss per prefix. update.py divides the sums.
"""

import torch
import torch.nn.functional as F


def choose(reward, u, may_lose):
    """The best and the worst candidate of every prefix (paper, section 2).

    reward float [B, C], nan = absent; u float [B, C] in (0, 1) decides among equals, so that no
    source is favoured; may_lose bool [C]: who may be rejected (the paper: everybody).
    -> chosen int64 [B], rejected int64 [B], keep bool [B]: False where nobody who may lose has a
    lower reward than the best, since a tie is no preference.
    """
    absent, spared = reward.isnan(), reward.isnan() | ~may_lose  # [B, C]
    high = reward.masked_fill(absent, -torch.inf).amax(dim=1, keepdim=True)  # [B, 1]
    low = reward.masked_fill(spared, torch.inf).amin(dim=1, keepdim=True)
    chosen = u.masked_fill(reward != high, -1.0).argmax(dim=1)
    rejected = u.masked_fill((reward != low) | spared, -1.0).argmax(dim=1)
    return chosen, rejected, (high > low).squeeze(1)


def dpo_loss(ratio, beta: float):
    """Rafailov et al. 2023, equation 7: -log sigmoid(beta * (log-ratio chosen - rejected)).

    ratio float [B, 2]: log policy(y) - log reference(y) of (chosen, rejected). -> loss [B]
    """
    return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))


def ipo_loss(ratio, beta: float):
    """Azar et al. 2023, equation 17: the margin is drawn to 1 / (2 beta). As dpo_loss."""
    return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)).square()


def dpop_loss(ratio, beta: float):
    """Pal et al. 2024, equation 3: DPO, and DPOP_WEIGHT times what the chosen has become less
    likely than it was, within the sigmoid. As dpo_loss."""
    fallen = DPOP_WEIGHT * (-ratio[:, 0]).clamp(min=0)
    return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1] - fallen))


DPOP_WEIGHT = 50.0  # their lambda
PAIR_LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "dpop": dpop_loss}


def nll_loss(logp):
    """Negative log-likelihood of one continuation each: logp [B, N], 0 beyond its length -> [B]."""
    return -logp.sum(dim=1)


def advantages(reward):
    """GRPO (Shao et al. 2024): a rollout's reward against its group's mean, over their deviation.

    reward float [B, C], nan = absent: no part in the mean, advantage 0. A group whose rewards are
    all equal gives zeros. -> float [B, C]
    """
    centred = reward - reward.nanmean(dim=1, keepdim=True)
    deviation = centred.square().nanmean(dim=1, keepdim=True).sqrt()
    return (centred / (deviation + 1e-6)).nan_to_num(0.0)


def grpo_loss(logp, old, advantage, lengths, clip: float, reference=None, kl=0.0):
    """Clipped policy gradient on every rollout of a prefix (Shao et al. 2024, equation 3).

    logp, old float [B, C, N]: under the policy now and when it sampled; advantage [B, C]; lengths
    int [B, C]. reference [B, C, N]: adds kl times their equation 4, an estimate of
    KL(policy || reference) that is unbiased on the policy's own samples and never negative.
    -> loss [B], the mean over the C rollouts.
    """
    ratio = (logp - old).exp()  # [B, C, N]
    gain = torch.minimum(
        ratio * advantage[..., None], ratio.clamp(1 - clip, 1 + clip) * advantage[..., None]
    )
    if reference is not None:
        moved = reference - logp
        gain = gain - kl * (moved.exp() - moved - 1)
    counts = torch.arange(logp.shape[2], device=logp.device) < lengths[..., None]  # [B, C, N]
    return -((gain * counts).sum(dim=2) / lengths.clamp(min=1)).mean(dim=1)
