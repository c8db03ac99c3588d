"""What the built-in losses maximise for one response, in plain PyTorch from the papers.

Each takes log-probs [T], old ones [T] and the advantage, one or [T], and returns a value for each token,
or one number for the response. No token forms, no stopped gradients but where a paper has them.
"""

from __future__ import annotations

import torch

# Narrow enough that they bind in the updates of support/updates.py.
CLIP, SEQUENCE_CLIP, CAP, DUAL, CLIP_LOG = 0.1, 0.02, 1.05, 1.15, 0.05
TAU_POSITIVE, TAU_NEGATIVE = 3.0, 5.0


def grpo(logp, old, advantage):
    ratio = (logp - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def dual_clip(logp, old, advantage):
    clipped = grpo(logp, old, advantage)
    return clipped.clamp(min=DUAL * advantage) if advantage < 0 else clipped


def cispo(logp, old, advantage):
    with torch.no_grad():
        weight = torch.clamp((logp - old).exp(), max=CAP)
    return weight * advantage * logp


def sapo(logp, old, advantage):
    tau = torch.where(torch.as_tensor(advantage) > 0, TAU_POSITIVE, TAU_NEGATIVE)
    return advantage * 4 / tau * torch.sigmoid(tau * ((logp - old).exp() - 1))


def reinforce(logp, old, advantage):
    return advantage * logp


def gspo(logp, old, advantage):
    ratio = ((logp - old).sum() / len(old)).exp()
    clipped = ratio.clamp(1 - SEQUENCE_CLIP, 1 + SEQUENCE_CLIP)
    return torch.minimum(ratio * advantage, clipped * advantage)


def gmpo(logp, old, advantage):
    sign = 1.0 if advantage > 0 else -1.0
    gains = sign * (logp - old)
    bounded = sign * torch.minimum(gains, gains.clamp(-CLIP_LOG, CLIP_LOG))
    return advantage * (bounded.sum() / len(old)).exp()


SURROGATES = {
    "grpo": grpo,
    "dual_clip": dual_clip,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
    "gspo": gspo,
    "gmpo": gmpo,
}
# By loss, its settings.
SETTINGS = {
    "grpo": {},
    "dual_clip": {"clip_dual": DUAL},
    "cispo": {"ratio_cap": CAP},
    "sapo": {"tau_positive": TAU_POSITIVE, "tau_negative": TAU_NEGATIVE},
    "reinforce": {},
    "gspo": {"clip_low": SEQUENCE_CLIP, "clip_high": SEQUENCE_CLIP},
    "gmpo": {"clip_log": CLIP_LOG},
}
