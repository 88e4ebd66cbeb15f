"""`pyramid-ldm check`."""

import argparse
from pathlib import Path

from pyramid_ldm.cli.common import find_config, folder

NAME = "check"
HELP = "reads every image of a folder: what can be trained on, what is converted or unreadable, what is there twice"
EXAMPLE = (
    "pyramid-ldm check photos/ --config autoencoder_configs/photographs_2k.yaml --report all.csv --sheet crops.jpg"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA, and for what."""
    parser.add_argument("data", metavar="DATA", type=folder, help="folder of photographs")
    parser.add_argument("--config", metavar="CONFIG", help="of stage one: its image_size, and how it cuts images")
    parser.add_argument("--report", metavar="FILE", type=folder, help="also write a CSV file, one line a file")
    parser.add_argument(
        "--sheet", metavar="FILE", type=folder, help="also write a JPEG of crops that training would see (--config)"
    )


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.check import check
    from pyramid_ldm.config import AutoencoderTraining, load_config
    from pyramid_ldm.data.photographs import Preprocessing
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.ownership import claim_file

    cut = None
    if arguments.config is not None:
        keys = ["data.root=x"]
        config = load_config(AutoencoderTraining, find_config(arguments.config, "autoencoder_configs"), keys)
        data = config.data
        cut = Preprocessing(
            (config.image_size[0], config.image_size[1]), data.crop, data.zoom, data.flip, data.upscale
        )  # fmt: skip
    elif arguments.sheet is not None:
        raise UserError("--sheet shows crops of a config's size; give --config, too")
    outputs = (("--report", arguments.report, b"file,verdict,"), ("--sheet", arguments.sheet, b"\xff\xd8"))
    for option, path, begins in outputs:
        if path is not None:
            claim_file(path, option, lambda found, begins=begins: begins_with(found, begins))  # type: ignore[misc]
    size = None if cut is None or cut.upscale else cut.image_size
    text, usable = check(arguments.data, size=size, cut=cut, report=arguments.report, sheet=arguments.sheet)
    print(text)
    if not usable:
        raise UserError(f"{arguments.data}: none of its images can be used")
    return True


def begins_with(path: Path, start: bytes) -> bool:
    """Whether a file does."""
    with path.open("rb") as file:
        return file.read(len(start)) == start
