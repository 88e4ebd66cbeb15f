"""`pyramid-ldm curate`."""

import argparse

from pyramid_ldm.cli.common import folder

NAME = "curate"
HELP = "selects and cuts photographs by the rules of the paper's data sets, SCAPES2K and PEOPLE2K"
EXAMPLE = "pyramid-ldm curate photos/ --rule scapes2k --out scapes2k/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA --rule --out."""
    parser.add_argument("data", metavar="DATA", type=folder, help="folder of photographs")
    parser.add_argument(
        "--rule",
        required=True,
        choices=["scapes2k", "people2k"],
        help="scapes2k: wider than 2048, higher than 1024, wider than high, to 2048x1024; people2k: both sides larger "
        "than 2048, the centre square, to 2048x2048",
    )
    parser.add_argument("--inclusive", action="store_true", help="also images of just these sizes")
    parser.add_argument("--out", type=folder, required=True, help="folder for the JPEGs and curated.csv")


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.curate import curate

    print(curate(arguments.data, arguments.out, arguments.rule, inclusive=arguments.inclusive))
    return True
