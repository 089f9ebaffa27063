"""DyDi-LiT: a diffusion transformer whose attention is DyDiLA, trained and sampled end to end."""

from importlib.util import find_spec

_EXTRA = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "psutil",
    "safetensors",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "tqdm",
    "tyro",
)

if _missing := [name for name in _EXTRA if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"the DyDi-LiT example needs {', '.join(_missing)}: pip install dydila-kernels[examples]", name=_missing[0]
    )
