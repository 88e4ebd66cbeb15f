"""What can be measured, in the order of the output."""

from bench.section import Section
from bench.sections import ceilings, coding, encode_files, end_to_end, flow, growth, shards, solver, train

SECTIONS: dict[str, Section] = {
    "ceilings": ceilings.SECTION,
    "decode": coding.DECODE,
    "encode": coding.ENCODE,
    "flow": flow.SECTION,
    "end_to_end": end_to_end.SECTION,
    "train": train.SECTION,
    "encode_files": encode_files.SECTION,
    "shards": shards.SECTION,
    "solver": solver.SECTION,
    "growth": growth.SECTION,
}
