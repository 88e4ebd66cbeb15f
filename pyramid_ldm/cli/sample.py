"""`pyramid-ldm sample`."""

import argparse

from pyramid_ldm.cli.common import MOST, add_device, add_solver, folder, solver_options, whole

NAME = "sample"
HELP = "draw new images with a trained flow (run again to resume)"
EXAMPLE = "pyramid-ldm sample runs/scapes2k-flow --num 16 --seed 0 --out samples/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FLOW_RUN, --num, --out and the solver."""
    parser.add_argument("flow", metavar="FLOW_RUN", type=folder, help="a run directory of train-flow")
    parser.add_argument("-n", "--num", type=whole(1, MOST), default=16, help="images (default: 16)")
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="image k of a seed is always the same (default: 0)"
    )
    parser.add_argument("--first", type=whole(0, MOST), default=0, help="index of the first image (default: 0)")
    parser.add_argument(
        "--out", type=folder, required=True, help="folder for PNGs, grid.png and samples.jsonl; of one flow and solver"
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="for reflow: write latents and which noise they were drawn from to --out, a cache that train-flow "
        "reads, and no pictures",
    )
    add_solver(parser)
    compilers = parser.add_mutually_exclusive_group()
    compilers.add_argument("--compile", action="store_true", help="compile the network first; pays for many images")
    compilers.add_argument(
        "--openvino", action="store_true", help="compile it with OpenVINO instead: for CPUs; takes seconds"
    )
    parser.add_argument("--batch-size", type=whole(1, 2**20), default=8, help="default: 8")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.ownership import claim, held, keep_apart
    from pyramid_ldm.pipeline import PyramidPipeline
    from pyramid_ldm.sample import finish_folder, refuse_other_settings, sample_to_folder, settings_of
    from pyramid_ldm.training.runtime import start

    options = solver_options(arguments)
    out = arguments.out
    keep_apart(out, "--out", {"FLOW_RUN": arguments.flow})
    runtime = start(arguments.device, arguments.precision)
    pipeline = PyramidPipeline.from_pretrained(arguments.flow).to(runtime.device)
    if arguments.compile or arguments.openvino:
        pipeline.compile("openvino" if arguments.openvino else "inductor")
    if arguments.pairs:
        from pyramid_ldm.pairs import draw_pairs

        if arguments.first:
            raise UserError("--first is for pictures; pairs begin at 0")
        draw_pairs(pipeline, out, arguments.num, arguments.seed, options, runtime, batch_size=arguments.batch_size)
        if runtime.main:
            print(f"done: {out}\nnext: pyramid-ldm train-flow CONFIG data.shards={out} init={arguments.flow}")
        return True
    settings = settings_of(pipeline, options, runtime.bf16)
    if runtime.main:
        claim(out, "samples", "--out", settings=settings)
    with held(out, runtime.main):
        runtime.barrier()
        refuse_other_settings(out, settings)
        indices = list(range(arguments.first, arguments.first + arguments.num))
        mine = indices[runtime.rank :: runtime.ranks]
        sample_to_folder(
            pipeline, out, mine, arguments.seed, options, batch_size=arguments.batch_size, bf16=runtime.bf16
        )
        runtime.barrier()
        if runtime.main:
            finish_folder(out, arguments.seed, indices)
    return True
