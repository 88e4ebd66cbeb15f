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
    from pyramid_ldm.check import COLUMNS, check, table
    from pyramid_ldm.config import AutoencoderTraining, load_config
    from pyramid_ldm.data.photographs import Preprocessing
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.ownership import claim_file, keep_apart

    size = config = cut = None
    if arguments.config is not None:
        found = find_config(arguments.config, "autoencoder_configs")
        config = load_config(AutoencoderTraining, found, ["data.root=x"])
        size, data = (config.image_size[0], config.image_size[1]), config.data
        cut = Preprocessing(size, data.crop, data.zoom, data.flip, data.upscale)
    elif arguments.sheet is not None:
        raise UserError("--sheet shows crops of a config's size; give --config, too")
    if arguments.report is not None:
        claim_file(arguments.report, "--report", lambda path: begins_with(path, ",".join(COLUMNS).encode()))
    if arguments.sheet is not None:
        keep_apart(arguments.sheet, "--sheet", {"DATA": arguments.data, "--report": arguments.report})
        claim_file(arguments.sheet, "--sheet", is_sheet)
    checked = check(arguments.data, None if cut is None or cut.upscale else size)
    print(table(checked), flush=True)
    if arguments.report is not None:
        checked.write_report(arguments.report)
    if not checked.usable:
        raise UserError(f"{arguments.data}: none of its images can be used")
    if arguments.sheet is not None and config is not None and cut is not None:
        checked.write_sheet(arguments.sheet, cut, config.seed, config.data.validation)
    return True


def begins_with(path: Path, start: bytes) -> bool:
    """Whether a file does."""
    with path.open("rb") as file:
        return file.read(len(start)) == start


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet of ours."""
    from PIL import Image

    from pyramid_ldm.check import SHEET

    try:
        with Image.open(path) as image:
            return image.info.get("comment") == SHEET
    except Exception:  # plugins raise nearly anything
        return False
