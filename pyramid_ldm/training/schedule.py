"""Pure functions of progress."""

import math

from pyramid_ldm.config.common import TrainConfig


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Linear warm-up over `warmup` images, then constant, or cosine to 0 at `images`."""
    rate = config.learning_rate
    if images_seen < config.warmup:
        return rate * (images_seen + 1) / config.warmup
    if config.decay == "cosine":
        span = max(1, config.images - config.warmup)
        progress = min(1.0, (images_seen - config.warmup) / span)
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    return rate


def due(interval: int, before: int, after: int) -> bool:
    """Whether a multiple of `interval` images lies in (before, after]."""
    return interval > 0 and after // interval > before // interval


def whole_steps(images: int, per_step: int) -> int:
    """`images` rounded up to a multiple of the images one optimizer step sees."""
    return -(-images // per_step) * per_step
