"""The paper's tables from files of evaluations, and once from training on, at toy size."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("examples.dydi_lit")

from dydila_kernels import functional
from examples.dydi_lit import configs, evaluate, generate, tables, train
from examples.dydi_lit.configs import Model
from examples.dydi_lit.data import DataError
from examples.dydi_lit.settings import TrainConfig
from examples.dydi_lit.tables import TABLES, TablesConfig, cell_of

SUB_IN = {"kind": "latents", "num_classes": 100, "size": 32, "image_size": 256}


def drawn(model: str = "dit", guidance: float = 4.0, **changes: Any) -> dict[str, Any]:
    return {"model": model, "size": "S", "seed": 0, "data": SUB_IN, "guidance": guidance, **changes}


def store(folder: Path, description: dict[str, Any], **figures: float) -> None:
    """An evaluation as evaluate --json writes it, with the fields that count."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"evaluator": "torchmetrics", "samples": "samples.npz", "drawn": description, "sfid": None, **figures}
    (folder / "x.json").write_text(json.dumps(values))


def cells(text: str, model: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {model} |"))
    return [part.strip() for part in line.split("|")[2:-1]]


def table(runs: Path, number: int, **options: Any) -> str:
    return tables.tables(TablesConfig(runs, tables=(number,), gflops=False, **options))


def test_rows_and_columns_are_the_papers() -> None:
    assert [entry.number for entry in TABLES] == list(range(1, 9))
    by_number = {entry.number: entry for entry in TABLES}
    assert len(by_number[1].models) * len(by_number[1].sizes) == 18
    assert by_number[2].resolution == 512 and by_number[2].sizes == ("L",)
    assert "moh-dit" in by_number[3].models and "lit" in by_number[3].models and len(by_number[4].models) == 6
    assert [len(entry.guidance) for entry in TABLES] == [2, 2, 3, 1, 1, 1, 2, 3]


def test_figures_stand_where_they_belong(tmp_path: Path) -> None:
    store(tmp_path / "a", drawn(), fid=35.29, kid=0.00804, precision=0.4705, recall=0.28)
    store(tmp_path / "b", drawn(guidance=1.0), fid=111.8)
    store(tmp_path / "c", drawn(guidance=2.5), fid=1.0)
    store(tmp_path / "d", drawn(data={**SUB_IN, "num_classes": 1000}), fid=16.6)
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "training.json").write_text(json.dumps({"steps_done": 3}))
    found = table(tmp_path, 1)
    assert cells(found, "DiT-S") == ["111.80", *[""] * 6, "35.29", "", "0.0080", "", "", "47.05", "28.00"]
    assert cells(found, "DyDi-LiT-L") == [""] * 14
    assert cells(table(tmp_path, 3), "DiT-S")[10] == "16.60"
    assert set("".join(cells(table(tmp_path, 2), "DiT-L"))) == set()


def test_several_runs_give_mean_and_spread(tmp_path: Path) -> None:
    for seed, fid in enumerate((10.0, 12.0)):
        store(tmp_path / str(seed), drawn("token-differential", seed=seed), fid=fid)
    assert cells(table(tmp_path, 6), "+ token differential operator")[0] == "11.00 ± 1.41"
    assert cell_of([], "FID") == "" and cell_of([0.00123], "sKID") == "0.0012"


def test_the_adm_evaluators_figures_come_first(tmp_path: Path) -> None:
    """Of the same samples; KID, which it does not have, stays."""
    store(tmp_path / "a", drawn(), fid=1.0, kid=0.5, inception_score=2.0)
    (tmp_path / "samples.npz.json").write_text(json.dumps(drawn()))
    printed = "warming up\nInception Score: 43.28\nFID: 35.29\nsFID: 7.15\nPrecision: 0.4705\nRecall: 0.2823\n"
    (tmp_path / "samples.npz.txt").write_text(printed)
    assert cells(table(tmp_path, 4), "Sana-S") == cells(table(tmp_path, 4), "+ reparameterization") == [""] * 7
    assert cells(table(tmp_path, 1), "DiT-S")[7:] == ["35.29", "7.15", "0.5000", "", "43.28", "47.05", "28.23"]


@pytest.mark.skipif(functional.TRITON is None, reason="Triton is not installed")
def test_gflops_are_counted(tmp_path: Path) -> None:
    found = tables.tables(TablesConfig(tmp_path, tables=(5,)))
    assert cells(found, "attention map-wise paradigm")[-1] == "6.43"
    assert cells(found, "+ token differential operator")[-1] == "5.98"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", "{", r"cannot read .*x\.json"),
        ("x.json", json.dumps({"evaluator": "x", "drawn": {"model": "dit"}}), "does not say what was drawn.*'data'"),
        ("x.npz.txt", "FID: 3", r"cannot read .*x\.npz\.json"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        table(tmp_path, 1)


def test_wrong_arguments_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.npz.json").write_text(json.dumps(drawn()))
    (tmp_path / "x.npz.txt").write_text("FID: 3\n")
    for arguments, message in [
        ([tmp_path / "nowhere"], "error: no folder .*nowhere"),
        ([tmp_path, "--tables", 9], "error: there are tables 1, 2, 3, 4, 5, 6, 7, 8; got 9"),
        ([tmp_path, "--no-gflops"], "is not what the ADM evaluator prints: expected Inception Score"),
    ]:
        monkeypatch.setattr(sys, "argv", ["tables", *map(str, arguments)])
        with pytest.raises(SystemExit, match=message):
            tables.main()


def test_from_training_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of a few steps, drawn and evaluated by the commands."""
    monkeypatch.setitem(configs._SIZES, "toy", {"dim": 32, "depth": 2, "ffn_ratio": 1.0})
    models: tuple[Model, ...] = ("sana", "dydi-lit")
    for model in models:
        run = TrainConfig(model=model, size="toy", steps=2, batch_size=8, progress=False, output=tmp_path / model)
        checkpoint, samples = train.train(run), tmp_path / model / "samples.npz"
        config = generate.GenerateConfig(checkpoint, output=samples, samples=20, steps=2, guidance=4.0, batch_size=10)
        generate.generate(config)
        generate.generate(replace(config, output=tmp_path / model / "plain.npz", guidance=1.0))
        for name in ("samples", "plain"):
            file = tmp_path / model / f"{name}.npz"
            options = ["--reference", "digits", "--json", f"{file}.evaluation.json"]
            monkeypatch.setattr(sys, "argv", ["evaluate", str(file), *options])
            evaluate.main()
    found = tables.tables(TablesConfig(tmp_path, toy=True))
    first, fourth = found.split("\n\n| Model")[1], found.split("Table 4")[1].split("Table 5")[0]
    for model in ("Sana-toy", "DyDi-LiT-toy"):
        row = dict(
            zip([f"{figure}{scale}" for scale in (1, 4) for figure in tables._ALL], cells(first, model), strict=True)
        )
        assert all(row[f"{figure}{scale}"] for scale in (1, 4) for figure in ("FID", "KID", "P%", "R%"))
        assert not any(row[f"{figure}{scale}"] for scale in (1, 4) for figure in ("sFID", "sKID", "IS"))  # of pixels
    stored = json.loads((tmp_path / "sana" / "samples.npz.evaluation.json").read_text())
    assert cells(fourth, "Sana-toy")[0] == f"{stored['fid']:.2f}"
    assert cells(first, "DiT-toy") == [""] * 14
