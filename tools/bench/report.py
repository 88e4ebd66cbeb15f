"""A whole run: sections in order, and their tables and files."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from bench.results import Row, compare, derive, merge
from bench.runner import lacking, run_items
from bench.sections import SECTIONS
from bench.sections.ceilings import best_convolution
from bench.settings import Settings
from bench.tables import cells, markdown, terminal


class Report:
    """Runs sections and keeps their rows; files in `out` are written anew after each."""

    def __init__(self, settings: Settings, header: dict[str, str], out: Path | None) -> None:
        self.settings, self.header, self.out = settings, header, out
        self.rows: dict[str, list[Row]] = {}

    def run(self, names: list[str]) -> None:
        """Measures, prints and writes."""
        print("\n".join(f"{key}: {value}" for key, value in self.header.items()), flush=True)
        planned = {name: SECTIONS[name].items(self.settings) for name in names}
        missing = lacking([item for items in planned.values() for item in items])
        if missing:
            say(f"not installed: {', '.join(missing)}: measuring without; pip install -e '.[bench]' brings the peers")
        plan = [item for items in planned.values() for item in items if item.needs not in missing]
        if self.settings.quick:  # one process for all
            self.finish(names, run_items(plan, self.settings, say))
            return
        for name in names:
            self.finish([name], run_items([item for item in plan if item.section == name], self.settings, say))

    def finish(self, names: list[str], rows: list[Row]) -> None:
        """Tables of sections whose items are measured."""
        for name in names:
            section = SECTIONS[name]
            own = self.rows[name] = merge([row for row in rows if row.section == name])
            if name == "ceilings":
                self.settings = replace(self.settings, ceiling=best_convolution(own, self.settings.precision))
            derive(own, self.settings)
            own += section.computed(self.rows, self.settings)
            compare(own)
            print(f"\n{section.title}\n{terminal(cells(own, section.columns))}\n", flush=True)
            self.write()

    def write(self) -> None:
        """benchmark.json and BENCHMARKS.md."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "header": self.header,
            "settings": asdict(self.settings),
            "sections": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
        }
        (self.out / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.out / "BENCHMARKS.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The whole document."""
        parts = ["# Benchmarks", "Written by `tools/benchmark.py`. What was not measured is said, not guessed."]
        parts.append("\n".join(f"- {key}: {value}" for key, value in self.header.items()))
        for name, rows in self.rows.items():
            section = SECTIONS[name]
            parts += [f"## {section.title}", section.about, markdown(cells(rows, section.columns))]
        return "\n\n".join(parts) + "\n"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
