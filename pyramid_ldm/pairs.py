"""A flow's own samples as a cache of latents with their noise, to straighten its paths (reflow: Liu et al. 2022)."""

import sys
from pathlib import Path

import torch

from pyramid_ldm.data.latents import make_record
from pyramid_ldm.data.plan import Plan, Row
from pyramid_ldm.data.shards import AUTOENCODER, INDEX, check_plan, has_shard, read_index, write_index, write_shard
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.ownership import claim, delete_file, held, replace_directory
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.training.runtime import Runtime

SHARD = 1024  # pairs
HELD_OUT = 0.05
NOISE = "pair"  # of its own: no sample of the flow that learns them begins where one of them did


def draw_pairs(
    pipeline: PyramidPipeline,
    out: Path,
    count: int,
    seed: int,
    options: SolverOptions,
    runtime: Runtime,
    *,
    batch_size: int,
) -> None:
    """Writes, or finishes, a shard directory of the latents that noise 0 to `count` - 1 of a seed leads to; every
    process draws its share of the shards. The noise need not be stored: it follows from the seed.

    Raises UserError where `out` is not ours, or holds other pairs or latents.
    """
    if options.solver == "ancestral":
        raise UserError("--solver ancestral draws fresh noise: where a pair ends is not where its noise leads")
    if runtime.main:
        claim(out, "shards", "--out")
    plan = make_plan(pipeline, count, seed, options, runtime.bf16)
    starts = list(range(0, count, SHARD))
    with held(out, runtime.main):
        if (out / INDEX).exists():
            check_plan(out, read_index(out).get("plan"), plan)
        todo = [n for n in range(len(starts)) if not has_shard(out, n, plan)]
        runtime.barrier()
        if runtime.main:
            print(
                f"sample: {count} pairs of noise and latents in {len(starts)} shards ({len(starts) - len(todo)} done), "
                f"seed {seed}, {options.describe()}, {pipeline.device}; to {out}",
                file=sys.stderr,
            )
            if todo:
                delete_file(out / INDEX, "shards")
                replace_directory(out / AUTOENCODER, "model", pipeline.autoencoder.save_pretrained)
        mine = todo[runtime.rank :: runtime.ranks]
        sizes = {n: min(SHARD, count - starts[n]) for n in mine}
        with Progress("pairs", sum(sizes.values())) as progress:
            for n in mine:
                indices = list(range(starts[n], starts[n] + sizes[n]))
                records = []
                for latents in pipeline.stream_latents(
                    indices, seed, options, batch_size=batch_size, bf16=runtime.bf16, noise=NOISE
                ):
                    records.append(make_record(latents, None, plan.dtype))
                    progress.advance(len(latents[0]))
                rows = [Row(str(index), False, 0, split_of(index)) for index in indices]
                write_shard(out, n, plan, torch.cat(records), rows, {}, {})
        runtime.barrier()
        if runtime.main and not (out / INDEX).exists():
            write_index(out, plan, len(starts), [])
        runtime.barrier()


def split_of(index: int) -> str:
    """Every twentieth pair is held out."""
    return "held_out" if index % round(1 / HELD_OUT) == 0 else "train"


def make_plan(pipeline: PyramidPipeline, count: int, seed: int, options: SolverOptions, bf16: bool) -> Plan:
    """What this cache will be."""
    drawn = ", ".join(f"{key} {value}" for key, value in options.record(bf16).items())
    return Plan(
        autoencoder=pipeline.autoencoder.fingerprint(),
        data=f"{count} samples of {pipeline.checkpoint}, {drawn}",
        image_size=list(pipeline.autoencoder.image_size),
        levels=list(pipeline.autoencoder.levels),
        has_variance=False,
        dtype="float16",
        precision="bf16" if bf16 else "fp32",
        crops=0,
        zoom=1.0,
        flip=False,
        validation=HELD_OUT,
        seed=seed,
        shard_size=SHARD,
        pairs=pipeline.scaling.to_dict() | {"noise": NOISE},
    )
