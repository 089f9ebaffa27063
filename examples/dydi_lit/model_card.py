"""The model card, README.md beside the weights: a template (`model_card.md`), and what a training run adds to it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from examples.dydi_lit.configs import TITLES

TEMPLATE = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
"""A jinja template as huggingface_hub wants it, which fills in `card_data`; all else may be left out."""


def card_kwargs(training: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of training.json; for `save_pretrained(..., model_card_kwargs=card_kwargs(training))`."""
    train, model, data = (dict(training[name]) for name in ("train", "model", "data"))
    settings = {
        "steps": training["steps_done"],
        **{f"train.{name}": value for name, value in train.items() if name not in ("output", "resume")},
        **{f"model.{name}": value for name, value in model.items()},
        **{f"data.{name}": value for name, value in data.items() if name != "class_names"},
        **training.get("versions", {}),
    }
    return {
        "kind": "checkpoint",
        "title": title_of(training),
        "steps_done": training["steps_done"],
        "data": data,
        "table": [(name, _cell(value)) for name, value in settings.items()],
    }


def title_of(training: dict[str, Any]) -> str:
    """The model that training.json tells of, as tables call it, and its size."""
    return f"{TITLES[training['train']['model']]} {training['train']['size']}"


def pipeline_card(training: dict[str, Any] | None) -> ModelCard:
    """The card of a whole pipeline, with the training run that `training` (training.json) tells of, if any."""
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusion", "linear-attention", "dydila"],
    )
    values = {} if training is None else card_kwargs(training)
    return ModelCard.from_template(card_data, template_str=TEMPLATE, **{**values, "kind": "pipeline"})


def _cell(value: Any) -> str:
    """A value as the text of a table's cell: on one line, without the bar that ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
