"""DyDiLiTPipeline: a trained model as a pipeline of diffusers, to draw from, to save, and to share on the Hub."""

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor

from dydila_kernels import DyDiLAttention
from examples.dydi_lit.checkpoint import CheckpointError, load_ema_model, load_network, read_training
from examples.dydi_lit.configs import ModelConfig
from examples.dydi_lit.diffusion import NOISE_SCHEDULE, GuidedChannels
from examples.dydi_lit.drawing import decode
from examples.dydi_lit.extract_latents import load_vae
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.model_card import pipeline_card

_DOWNLOADED = ["model_index.json", "training.json", "README.md", "*/*.json", "*/*.safetensors"]
_EXECUTING = ("custom_pipeline", "trust_remote_code")


class DyDiLiTPipeline(DiffusionPipeline):
    """Draws images of given classes; used as the pipelines of diffusers are.

        pipe = DyDiLiTPipeline.from_pretrained("you/name").to("cuda")
        pipe(["tench", 7], guidance_scale=4.0, generator=torch.manual_seed(0)).images[0].save("tench.png")

    Components: `transformer` (DiffusionTransformer), `scheduler` (any of diffusers that predicts from noise), and `vae`
    (AutoencoderKL; None for a model of pixels). `size` is the height and width of what the transformer sees, pixels or
    latents; `class_names` the names of the classes, in order; `training` is training.json, for the model card.

    The scheduler keeps its state in float32, whatever the dtype of the transformer.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    # The transformer, too: diffusers would not know how to load it, and this class does.
    _optional_components = ["transformer", "vae"]  # noqa: RUF012  (a list in diffusers)

    def __init__(
        self,
        transformer: DiffusionTransformer,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        size: int = 32,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if type(size) is not int or size < 1 or size % transformer.config.patch_size:
            raise ValueError(f"size must be a multiple of the patches' {transformer.config.patch_size}; got {size!r}")
        if class_names is not None and len(class_names) != transformer.config.num_classes:
            raise ValueError(
                f"class_names must name the {transformer.config.num_classes} classes; got {len(class_names)} names"
            )
        self.register_modules(scheduler=scheduler, vae=vae)
        self.register_to_config(
            transformer=(None, None), size=size, class_names=None if class_names is None else list(class_names)
        )
        self.transformer = transformer
        self.labels = {name: number for number, name in enumerate(class_names or ())}
        self.training: dict[str, Any] | None = None

    @classmethod
    def from_checkpoint(cls, folder: str | Path, vae: AutoencoderKL | str | Path | None = None) -> "DyDiLiTPipeline":
        """The pipeline of a training checkpoint, with the sampler of DiT (DDPM, learned variance).

        `vae` decodes latents: an object, a folder or a name on the Hub; the one that made the training data unless
        given. Raises CheckpointError for a folder that is no checkpoint, DataError for a VAE that cannot be loaded, and
        ValueError for one that does not fit.
        """
        training = read_training(Path(folder))
        data = training["data"]
        decoder = _vae_of(data, vae)
        transformer = load_ema_model(Path(folder), fuse=False)
        if decoder is not None:
            decoder.to(transformer.output.weight.device)
        scheduler = scheduler_of(transformer.config, clip=decoder is None)
        pipe = cls(transformer, scheduler, decoder, data["size"], data["class_names"])
        pipe.training = training
        return pipe

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "DyDiLiTPipeline":  # type: ignore[override]
        """A pipeline that `save_pretrained` wrote, from a folder or the Hub.

        Takes the arguments of diffusers' `from_pretrained`, such as `dtype`, `scheduler`, `revision` and `token`, but
        those that would run code of the folder. Reads JSON and safetensors only. Raises ValueError for a folder that
        holds no such pipeline, or names classes that are not diffusers' own, and what diffusers raises, OSError mostly,
        for a scheduler or a VAE that it cannot load.
        """
        if refused := [name for name in _EXECUTING if kwargs.get(name)]:
            raise ValueError(f"{', '.join(refused)} must be left out: this pipeline never runs code of a folder")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
            options = {name: kwargs.pop(name) for name in names if name in kwargs}
            downloaded = snapshot_download(
                os.fspath(pretrained_model_name_or_path), allow_patterns=_DOWNLOADED, **options
            )
            folder = Path(downloaded)
        _check_index(folder)
        if "transformer" not in kwargs:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):
                dtype = dtype.get("transformer", dtype.get("default"))
            kwargs["transformer"] = load_transformer(folder / "transformer").to(dtype=dtype)
        pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        if (folder / "training.json").exists():
            try:
                pipe.training = read_training(folder)
            except CheckpointError as error:
                raise ValueError(str(error)) from error
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes all components (safetensors), and a model card; ValueError for a fused transformer.

        Takes the arguments of diffusers' `save_pretrained` about the components, such as `max_shard_size` of the VAE.
        """
        if any(isinstance(module, DyDiLAttention) and module.fused for module in self.transformer.modules()):
            raise ValueError("transformer must not be fused: save the pipeline before transformer.fuse()")
        if kwargs.pop("push_to_hub", False) or not kwargs.setdefault("safe_serialization", True):
            raise ValueError("push_to_hub is a method of its own here, and safe_serialization is always on")
        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)
        self.transformer.save_pretrained(folder / "transformer")
        if self.training is not None:
            (folder / "training.json").write_text(json.dumps(self.training, indent=2) + "\n")
        pipeline_card(self.training).save(folder / "README.md")

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload DyDiLiTPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository of the Hub, made if need be; returns its address."""
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of classes given by name; ValueError for a name that is none of them."""
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                known = ", ".join(list(self.labels)[:10]) or "none: the pipeline was made without class_names"
                raise ValueError(f"class_labels must be among pipe.labels ({known} ...); got {name!r}")
        return [self.labels[name] for name in names]

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 250,
        guided_channels: GuidedChannels = "all",
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image for each label.

        Args:
            class_labels: classes by number or by name; one or several.
            guidance_scale: g of classifier-free guidance, eps(null) + g (eps(label) - eps(null)); 1 is none.
            num_inference_steps: steps of the scheduler.
            guided_channels: "all" channels of the noise, or the first "three" as in DiT.
            generator: of the noise; a list has one for each image, whose image then does not depend on the others.
            output_type: "pil" (list of PIL images), "np" (n, height, width, channels) or "pt" (n, channels, height,
                width), both float32 in 0..1.
            return_dict: whether to return an ImagePipelineOutput, with the images in `images`, or a tuple.

        Raises:
            ValueError: an argument is not as described; the message names it and its value.
        """
        labels = self._label_tensor(class_labels)
        config = self.transformer.config
        if guided_channels not in ("all", "three"):
            raise ValueError(f"guided_channels must be 'all' or 'three'; got {guided_channels!r}")
        if guided_channels == "three" and config.in_channels < 3:
            raise ValueError(f"guided_channels 'three' needs 3 channels or more; this model has {config.in_channels}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt'; got {output_type!r}")
        guided = config.in_channels if guided_channels == "all" else 3

        scheduler, takes_variance = self._scheduler_of_call()
        device, dtype = self._execution_device, self.transformer.output.weight.dtype
        scheduler.set_timesteps(num_inference_steps, device=device)
        options = _accepted(scheduler.step, generator=generator, use_clipped_model_output=True)
        labels = labels.to(device)
        both_labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_class)])
        size = self.config["size"]
        shape = (len(labels), config.in_channels, size, size)
        images = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        images = images * scheduler.init_noise_sigma

        for timestep in self.progress_bar(scheduler.timesteps):
            scaled = scheduler.scale_model_input(images, timestep).to(dtype)
            if guidance_scale == 1:
                output = self.transformer(scaled, timestep.expand(len(labels)), labels).float()
            else:
                timesteps = timestep.expand(len(both_labels))
                given, null = self.transformer(torch.cat([scaled, scaled]), timesteps, both_labels).float().chunk(2)
                steered = null[:, :guided] + guidance_scale * (given[:, :guided] - null[:, :guided])
                output = torch.cat([steered, given[:, guided:]], dim=1)
            if not takes_variance:
                output = output[:, : config.in_channels]
            images = scheduler.step(output, timestep, images, **options).prev_sample

        if self.vae is not None:
            images = decode(self.vae, images, self.vae.config.scaling_factor)
        result = VaeImageProcessor().postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _label_tensor(self, class_labels: int | str | Sequence[int | str]) -> Tensor:
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not given:
            raise ValueError("class_labels must name at least one class; got none")
        numbers = [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in given]
        for number in numbers:
            if not 0 <= number < self.transformer.config.num_classes:
                raise ValueError(f"class_labels must be in 0..{self.transformer.config.num_classes - 1}; got {number}")
        return torch.tensor(numbers)

    def _scheduler_of_call(self) -> tuple[Any, bool]:
        """The scheduler, and whether it takes a learned variance beside the noise."""
        scheduler = self.scheduler
        learned = str(scheduler.config.get("variance_type")).startswith("learned")
        if isinstance(scheduler, DDPMScheduler):
            return scheduler, learned and self.transformer.config.learn_sigma
        # `from_config` hands the setting on to schedulers that make another use of it: they keep three channels.
        return type(scheduler).from_config(scheduler.config, variance_type=None) if learned else scheduler, False


def scheduler_of(config: ModelConfig, *, clip: bool) -> DDPMScheduler:
    """The scheduler that samples as DiT does; `clip` keeps estimates of the clean image in -1..1, as pixels are."""
    return DDPMScheduler(
        **NOISE_SCHEDULE,
        variance_type="learned_range" if config.learn_sigma else "fixed_small",
        clip_sample=clip,
        timestep_spacing="linspace",
    )


def load_transformer(folder: Path) -> DiffusionTransformer:
    """A model from config.json and model.safetensors, on the CPU, for inference; ValueError where they do not fit."""
    try:
        return load_network(folder)
    except CheckpointError as error:
        raise ValueError(f"cannot load the transformer in {folder}: {error}") from error


def _vae_of(data: dict[str, Any], vae: Any) -> Any:
    """The VAE of a model that was trained on `data`, loaded unless it is an object; None for pixels."""
    if data["kind"] != "latents":
        if vae is not None:
            raise ValueError(f"vae must be None for a model of {data['kind']}, which draws pixels; got {vae!r}")
        return None
    if vae is None or isinstance(vae, str | Path):
        vae = load_vae(str(vae or data["vae"]))
    got, expected = vae.config.latent_channels, data["channels"]
    if got != expected or vae.config.scaling_factor != data["scaling_factor"]:
        raise ValueError(
            f"vae must have {expected} latent channels and scaling factor {data['scaling_factor']}, as in training; "
            f"got {got} and {vae.config.scaling_factor}"
        )
    return vae.eval()


def _check_index(folder: Path) -> None:
    """ValueError unless model_index.json is of this pipeline, with components of diffusers alone."""
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"no pipeline at {folder}: there is no model_index.json; DyDiLiTPipeline.from_checkpoint loads a checkpoint"
        ) from None
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"{file} is damaged: it must hold an object; got {index!r:.40}")
    if index.get("_class_name") != DyDiLiTPipeline.__name__:
        raise ValueError(f"{folder} must hold a {DyDiLiTPipeline.__name__}; got a {index.get('_class_name')}")
    for name in ("transformer", "scheduler", "vae"):
        match index.get(name):
            case None | [None, None]:
                pass
            case ["diffusers", str(component)] if isinstance(getattr(diffusers, component, None), type):
                pass
            case [library, _] if library != "diffusers":
                raise ValueError(f"the {name} of {folder} must be a class of diffusers; got one of {library}")
            case other:
                raise ValueError(f"the {name} of {folder} must be a class of diffusers; got {other!r}")


def _accepted(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the function has."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}
