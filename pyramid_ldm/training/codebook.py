"""Keeping the entries of VQ codebooks in use (P22)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyramid_ldm.pyramid import Pyramid
from pyramid_ldm.randomness import generator
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.optimizer import Optimizer
from pyramid_ldm.training.runtime import Runtime


class CodebookUse:
    """Which entries of each level's codebook are used, and new values for those that are not.

    Args:
        sizes: entries of each level.
        restart: an entry that was not used for so many images becomes a latent of the batch at hand; 0: never.
    """

    def __init__(self, sizes: Sequence[int], restart: int, device: torch.device) -> None:
        self.restart = restart
        self.last_used = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]  # images seen then
        self.counts = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]  # since the last log line

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"last_used": self.last_used, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for mine, saved in ((self.last_used, state["last_used"]), (self.counts, state["counts"])):
            for tensor, value in zip(mine, saved, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def record(self, indices: Sequence[Tensor], images_seen: int) -> None:
        """Entries that a micro-batch used, any shape, a tensor a level."""
        for counts, last, used in zip(self.counts, self.last_used, indices, strict=True):
            counts += torch.bincount(used.flatten(), minlength=len(counts))
            last[used.flatten()] = images_seen

    @torch.no_grad()
    def figures(self, names: Sequence[str], runtime: Runtime) -> dict[str, float]:
        """{"codebook_usage_4x4": share of the entries that were used since the last call, "codebook_perplexity_4x4":
        exp of the entropy of how often}, over all processes. Empty where nothing was recorded."""
        found = {}
        for name, counts in zip(names, self.counts, strict=True):
            total = runtime.sum(counts)
            if total.sum() > 0:
                shares = total.double() / total.sum()
                found[f"codebook_usage_{name}"] = float((total > 0).double().mean())
                found[f"codebook_perplexity_{name}"] = float(torch.special.entr(shares).sum().exp())
            counts.zero_()
        return found

    @torch.no_grad()
    def revive(
        self,
        quantizers: Sequence[nn.Module],
        latents: Pyramid,
        images_seen: int,
        seed: int,
        optimizer: Optimizer,
        ema: PowerEma,
        prefix: str,
        runtime: Runtime,
    ) -> int:
        """Gives entries that nothing has used for `restart` images the values of latents (B, C, H, W) drawn from the
        first process's batch, in the averages, too, and forgets their moments. Returns how many."""
        if not self.restart:
            return 0
        count = 0
        for level, (quantizer, values, last) in enumerate(zip(quantizers, latents, self.last_used, strict=True)):
            last.copy_(runtime.gather_largest(last))
            dead = (images_seen - last >= self.restart).nonzero().flatten()
            if not len(dead):
                continue
            rows = values.detach().float().movedim(1, -1).flatten(0, -2)
            order = torch.randint(len(rows), (len(dead),), generator=generator(seed, "codebook", images_seen, level))
            fresh = runtime.from_first(rows[order.to(rows.device)].contiguous())
            weight = cast(nn.Embedding, quantizer.embedding).weight
            weight[dead] = fresh.to(weight.dtype)
            for track in ema.tracks.values():
                track[f"{prefix}.{level}.embedding.weight"][dead] = fresh
            for moment in optimizer.state[weight].values():
                if moment.shape == weight.shape:
                    moment[dead] = 0
            last[dead] = images_seen
            count += len(dead)
        return count
