"""The paper's tables, filled with what runs in a folder gave: python -m examples.dydi_lit.tables RUNS

Every file below the folder that `evaluate --json` wrote, of an .npz by `generate`, is a row's figures at one scale of
guidance (CFG); so is what OpenAI's ADM evaluator printed, in a file beside the .npz with .txt after its name, which
comes first where both are there, for it is the paper's:

    python evaluator.py REFERENCE.npz SAMPLES.npz > SAMPLES.npz.txt
    python -m examples.dydi_lit.evaluate SAMPLES.npz --reference REFERENCE.npz --features inception:Features \\
        --json SAMPLES.npz.evaluation.json

A cell without a run is empty; several runs, such as those of several seeds, give their mean and standard deviation.
GFLOPs are counted (see flops.py). With --toy all tables are of runs with digits and the size toy.
"""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from dydila_kernels.functional import why_not_triton
from examples.dydi_lit.checkpoint import plain_errors
from examples.dydi_lit.configs import LADDER, TITLES, Model, ModelConfig, Size, config_of
from examples.dydi_lit.data import DataError
from examples.dydi_lit.flops import config_named, gflops

_ALL = ("FID", "sFID", "KID", "sKID", "IS", "P%", "R%")
_ADM = ("FID", "sFID", "IS", "P%", "R%")
_NAMES = {
    "fid": "FID", "sfid": "sFID", "kid": "KID", "skid": "sKID", "inception_score": "IS", "precision": "P%",
    "recall": "R%",
}  # fmt: skip
_PRINTED = {"Inception Score": "IS", "FID": "FID", "sFID": "sFID", "Precision": "P%", "Recall": "R%"}
_SUB_IN: tuple[Model, ...] = ("dit", "dig", "pixart-sigma", "edit", "sana", "dydi-lit")
_IMAGENET: tuple[Model, ...] = ("dit", "moh-dit", "dig", "lit", "sana", "dydi-lit")
_CLASSES = {"Sub-IN": 100, "ImageNet-1K": 1000}


class Table(NamedTuple):
    """One of the paper's tables: models and sizes by guidance and figure."""

    number: int
    data: str
    resolution: int
    models: tuple[Model, ...]
    sizes: tuple[Size, ...]
    guidance: tuple[float, ...]
    figures: tuple[str, ...]
    counted: bool
    """Whether it has a column of GFLOPs."""


TABLES = (
    Table(1, "Sub-IN", 256, _SUB_IN, ("S", "B", "L"), (1.0, 4.0), _ALL, True),
    Table(2, "Sub-IN", 512, _SUB_IN, ("L",), (1.0, 4.0), _ALL, True),
    Table(3, "ImageNet-1K", 256, _IMAGENET, ("S",), (1.0, 1.5, 4.0), _ADM, False),
    Table(4, "Sub-IN", 256, LADDER, ("S",), (4.0,), _ALL, False),
    Table(5, "Sub-IN", 256, ("map-differential", "token-differential"), ("S",), (4.0,), _ALL, True),
    Table(6, "Sub-IN", 256, ("increasing-lambda", "token-differential"), ("S",), (4.0,), _ALL, False),
    Table(7, "Sub-IN", 256, _SUB_IN, ("S",), (2.0, 3.0), _ALL, True),
    Table(8, "ImageNet-1K", 256, ("dit", "sana", "dydi-lit"), ("S",), (1.25, 2.0, 3.0), _ADM, False),
)  # fmt: skip


class Key(NamedTuple):
    """What a run must have been for a cell."""

    model: str
    size: str
    data: str
    """Sub-IN, ImageNet-1K or digits."""
    resolution: int
    guidance: float


@dataclass(frozen=True)
class TablesConfig:
    """Print the paper's tables in Markdown, with the figures of the runs in a folder."""

    runs: tyro.conf.Positional[Path]
    """Folder below which the evaluations are."""
    toy: bool = False
    """Tables of models of the size toy, trained on digits."""
    tables: tuple[int, ...] = tuple(table.number for table in TABLES)
    """Numbers of the tables to print."""
    gflops: bool = True
    """Count GFLOPs, which takes seconds."""


def tables(config: TablesConfig) -> str:
    """The tables; DataError where there is no folder or no such table, or an evaluation is damaged."""
    if not config.runs.is_dir():
        raise DataError(f"no folder {config.runs}")
    known = {table.number: table for table in TABLES}
    if unknown := sorted(set(config.tables) - known.keys()):
        raise DataError(f"there are tables {', '.join(map(str, known))}; got {', '.join(map(str, unknown))}")
    found = evaluations(config.runs)
    return "\n\n".join(_print(known[number], found, config) for number in config.tables)


def evaluations(folder: Path) -> dict[Key, dict[str, list[float]]]:
    """The figures found, in the tables' units: percents for precision and recall."""
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(
        dict
    )  # by samples, so that ADM's take the place of ours
    for file in sorted(folder.rglob("*.json")):
        stored = _read(file)
        if isinstance(stored, dict) and "evaluator" in stored and isinstance(stored.get("drawn"), dict):
            values = {name: stored[field] for field, name in _NAMES.items() if stored.get(field) is not None}
            found[_key(stored["drawn"], file)].setdefault(json.dumps(stored["drawn"]), {}).update(_in_percent(values))
    for file in sorted(folder.rglob("*.npz.txt")):
        drawn = _read(file.with_suffix(".json"))
        printed = re.findall(
            rf"^({'|'.join(_PRINTED)}): ([0-9.eE+-]+)$", file.read_text(errors="replace"), re.MULTILINE
        )
        if len(printed) != len(_PRINTED):
            raise DataError(f"{file} is not what the ADM evaluator prints: expected {', '.join(_PRINTED)}")
        values = {_PRINTED[name]: float(value) for name, value in printed}
        found[_key(drawn, file)].setdefault(json.dumps(drawn), {}).update(_in_percent(values))
    gathered: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, runs in found.items():
        for values in runs.values():
            for name, value in values.items():
                gathered[key][name].append(value)
    return gathered


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def _key(drawn: Any, file: Path) -> Key:
    """The cell of samples that `generate` described so; DataError names the file that goes with them."""
    try:
        data = drawn["data"]
        digits = data["kind"] == "digits"
        names = {count: name for name, count in _CLASSES.items()}
        name = "digits" if digits else names.get(data["num_classes"], f"{data['num_classes']} classes")
        return Key(drawn["model"], drawn["size"], name, data.get("image_size", data["size"]), float(drawn["guidance"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} does not say what was drawn by which model: {type(error).__name__} {error}") from None


def _in_percent(values: dict[str, float]) -> dict[str, float]:
    """Precision and recall as percents of shares."""
    return {name: 100 * value if name.endswith("%") else value for name, value in values.items()}


def _print(table: Table, found: dict[Key, dict[str, list[float]]], config: TablesConfig) -> str:
    """One table in Markdown."""
    data, resolution = ("digits", 8) if config.toy else (table.data, table.resolution)
    sizes: tuple[Size, ...] = ("toy",) if config.toy else table.sizes
    counted = table.counted and config.gflops and not config.toy
    heads = [f"{figure}, CFG={scale:g}" for scale in table.guidance for figure in table.figures]
    lines = [f"Table {table.number}: {data}, {resolution} pixels", "", _row(["Model", *heads, *["GFLOPs"] * counted])]
    lines.append("|" + "---|" * (1 + len(heads) + counted))
    for size in sizes:
        for model in table.models:
            keys = [Key(model, size, data, resolution, scale) for scale in table.guidance]
            cells = [cell_of(found.get(key, {}).get(figure, []), figure) for key in keys for figure in table.figures]
            flops = list(_gflops(_config_of(table, model, size), resolution)) if counted else []
            lines.append(_row([_title(table, model, size), *cells, *flops]))
    return "\n".join(lines)


def _title(table: Table, model: Model, size: Size) -> str:
    """The row's name in the table; Table 4 has a name of its own for the whole."""
    if table.number == 4 and model == "dydi-lit":
        return "+ reparameterization"
    return f"{TITLES[model]}-{size}" if model in (*_SUB_IN, *_IMAGENET) else TITLES[model]


def cell_of(values: list[float], figure: str) -> str:
    """The mean, with the standard deviation of several; empty without a value."""
    digits = 4 if "KID" in figure else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}" if values else ""


def _config_of(table: Table, model: Model, size: Size) -> ModelConfig:
    """What GFLOPs are counted of: in Table 5 the models with the convolution, see flops.py."""
    if table.number == 5:
        return config_named("DyDi-LiT-S map-wise" if model == "map-differential" else "DyDi-LiT-S")
    return config_of(model, size)


def _gflops(config: ModelConfig, resolution: int) -> Iterator[str]:
    """The counted GFLOPs; an empty cell where Triton, which the count of our operators needs, is missing."""
    without = why_not_triton(torch.device("meta"), torch.float32)
    yield "" if without else f"{gflops(config, resolution)[0]:.2f}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    with plain_errors():
        print(tables(tyro.cli(TablesConfig, prog="python -m examples.dydi_lit.tables")))


if __name__ == "__main__":
    main()
