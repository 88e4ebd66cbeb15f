"""From noise to images: what `pyramid-ldm sample` and a notebook use."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from pyramid_ldm.autoencoders.load import Build, build_autoencoder, read_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.condition import Condition, Context
from pyramid_ldm.config import NCSNppConfig
from pyramid_ldm.data.images import to_pil
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, sha256, write_json
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.nn.layers import to_bfloat16
from pyramid_ldm.openvino_backend import OpenVINO
from pyramid_ldm.ownership import claim
from pyramid_ldm.processes.build import process_from_dict, process_to_dict
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.process import Process
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import ADAPTIVE, Progress, Solution, SolverOptions, solve
from pyramid_ldm.processes.steps import Draw
from pyramid_ldm.pyramid import LatentScaling, Pyramid, pyramid_noise
from pyramid_ldm.serialization import Stored, assemble, read_model, read_stored

FORMAT = 4
MANIFEST = "pipeline.json"
TILE = {"cpu": 512}  # what its caches like; other devices decode a 2K image whole


@dataclass(frozen=True)
class PipelineOutput:
    """Samples of one call (or one batch of it)."""

    images: list[Image.Image]
    latents: Pyramid  # raw (unscaled), (N, C_i, H/f_i, W/f_i), on the CPU
    nfe: int  # evaluations of the network; the mean over images, rounded
    image_nfe: tuple[int, ...]  # those of each image (RK45 takes another step size for each)


class PyramidPipeline:
    """A network, the process it was trained for, the autoencoder whose latents it learned, and the scaling between
    them.

    Args:
        process: None: rectified flow.
        checkpoint: identifies the network's weights, for the record of a sample.
    """

    def __init__(
        self,
        network: PyramidNCSNpp,
        autoencoder: Autoencoder,
        scaling: LatentScaling,
        process: Process | None = None,
        *,
        checkpoint: str = "",
    ) -> None:
        self.network, self.autoencoder = network.eval(), autoencoder.eval()
        self.scaling, self.process, self.checkpoint = scaling, process or RectifiedFlow(), checkpoint
        self.device = torch.device("cpu")
        self._compiled = False
        self.openvino: OpenVINO | None = None  # what computes instead of PyTorch, where asked for
        self._bf16: dict[str, nn.Module] = {}  # copies with bfloat16 weights, made when first used

    def to(self, device: str | torch.device) -> Self:
        """Moves both networks; returns self. UserError where a network that OpenVINO runs would leave the CPU."""
        if self.openvino:
            OpenVINO.refuse(device)
        self.device = torch.device(device)
        self._bf16.clear()
        for network in (self.network, self.autoencoder):
            network.to(self.device)
        return self

    def compile(self, backend: Literal["inductor", "openvino"] = "inductor") -> Self:
        """Compiles the network at its first use, for one batch size: faster steps ever after. Returns self.

        Args:
            backend: `inductor` takes minutes (on CUDA, CUDA graphs come of it), `openvino` a quarter of one, on a CPU.

        Raises UserError where the backend is missing or not for this device.
        """
        if backend == "openvino":
            OpenVINO.refuse(self.device)
            self.openvino = OpenVINO()
        self._compiled = True
        self._bf16.clear()
        return self

    def _ready(self, name: str, bf16: bool) -> nn.Module:
        """For use in either precision. What is stored in float32 stays where it was read from, which may be the file,
        until it is used."""
        network: nn.Module = getattr(self, name)
        if bf16:
            if name not in self._bf16:
                self._bf16[name] = to_bfloat16(network)
            network = self._bf16[name]
        else:
            network.to(memory_format=torch.channels_last)
        if self._compiled and self.openvino is None and name == "network" and network._compiled_call_impl is None:
            network.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        return network

    def __call__(
        self,
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        solver: str = "abm2",
        steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        max_nfe: int | None = None,
        spacing: str = "uniform",
        eta: float | None = None,
        guidance: float = 1.0,
        batch_size: int = 8,
        bf16: bool = False,
    ) -> PipelineOutput:
        """Draws images `first_index`, `first_index` + 1, ... of `seed`.

        Image k of a seed has the same initial noise whatever the batch size. `bf16` computes the decoder, and with
        fixed steps the network, in bfloat16; the solver's state stays float32. For the rest see `SolverOptions`.
        Raises UserError where the solve cannot go on.
        """
        options = SolverOptions(solver, steps, rtol, atol, max_nfe, spacing=spacing, eta=eta, guidance=guidance)
        indices = list(range(first_index, first_index + num_images))
        outputs = list(self.stream(indices, seed, options, batch_size=batch_size, bf16=bf16))
        return PipelineOutput(
            [image for output in outputs for image in output.images],
            tuple(torch.cat(level) for level in zip(*(output.latents for output in outputs), strict=True)),
            round(sum(nfe for output in outputs for nfe in output.image_nfe) / num_images),
            tuple(nfe for output in outputs for nfe in output.image_nfe),
        )

    def stream(
        self,
        indices: list[int],
        seed: int,
        options: SolverOptions,
        *,
        batch_size: int = 8,
        bf16: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[PipelineOutput]:
        """Yields one output a batch, as soon as it is done."""
        for solution in self._solutions(indices, seed, options, batch_size, bf16, progress):
            latents = self.scaling.unscale(solution.latents)
            images = [to_pil(image) for image in self.decode(latents, bf16=bf16)]
            nfe = round(sum(solution.sample_nfe) / len(images))
            yield PipelineOutput(images, tuple(level.cpu() for level in latents), nfe, solution.sample_nfe)

    def stream_latents(
        self,
        indices: list[int],
        seed: int,
        options: SolverOptions,
        *,
        batch_size: int = 8,
        bf16: bool = False,
        noise: str = "sample",
    ) -> Iterator[Pyramid]:
        """As `stream`, raw latents alone, nothing decoded. `noise`: what it is drawn for; samples' by default."""
        for solution in self._solutions(indices, seed, options, batch_size, bf16, None, noise):
            yield tuple(level.cpu() for level in self.scaling.unscale(solution.latents))

    def _solutions(
        self,
        indices: list[int],
        seed: int,
        options: SolverOptions,
        batch_size: int,
        bf16: bool,
        progress: Progress | None,
        purpose: str = "sample",
    ) -> Iterator[Solution]:
        """Scaled latents, a batch at a time."""
        if not indices or batch_size < 1:
            raise UserError("num_images and batch_size must be at least 1")
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            noise = pyramid_noise(self.network.shapes, seed, purpose, chosen)

            def draw(step: int, chosen: list[int] = chosen) -> Pyramid:
                return pyramid_noise(self.network.shapes, seed, f"{purpose}, step {step}", chosen)

            rows = min(batch_size, len(indices))
            yield self.solve(noise, options, bf16=bf16, draw=draw, progress=progress, rows=rows)

    @torch.inference_mode()
    def solve(
        self,
        noise: Pyramid,
        options: SolverOptions,
        *,
        bf16: bool = False,
        draw: Draw | None = None,
        progress: Progress | None = None,
        rows: int = 0,
    ) -> Solution:
        """Scaled latents from noise. A compiled network always sees at least `rows` samples."""
        if options.guidance != 1 and not self.network.config.early:
            raise UserError(f"guidance is {options.guidance:g}; this network was trained without model.early")
        noise = tuple(level.to(self.device) for level in noise)
        rows = max(rows, noise[0].shape[0])
        network_bf16 = options.network_in_bf16(bf16)
        network = self.network if self.openvino else self._ready("network", network_bf16)

        def evaluate(noisy: Pyramid, context: Context) -> Pyramid:
            present = len(context.label)
            context = replace(context, guidance=options.guidance)
            if self._compiled:  # for one batch size: fill up where samples have finished, or are few
                noisy = tuple(_fill(level, rows) for level in noisy)
                context = replace(context, label=_fill(context.label, rows), sigma=_fill(context.sigma, rows))
                torch.compiler.cudagraph_mark_step_begin()
            result: Pyramid
            if self.openvino:
                result = self.openvino.evaluate(network, noisy, context, network_bf16)
            else:
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=network_bf16):
                    result = network(noisy, context)
            return tuple(level[:present] for level in result)

        def predict(noisy: Pyramid, t: Tensor, told: Tensor) -> Prediction:
            return self.process.predict(evaluate, noisy, t, Condition(), told)

        with _exact_float32() if options.solver in ADAPTIVE else nullcontext():
            return solve(options, self.process, predict, noise, draw=draw, progress=progress)

    @torch.inference_mode()
    def decode(self, latents: Pyramid, *, bf16: bool = False) -> Iterator[Tensor]:
        """Raw latents to images (3, H, W) in [-1, 1], one at a time: a 2K image needs the memory of one."""
        tile = TILE.get(self.device.type, 2048)
        network = cast(Autoencoder, self._ready("autoencoder", bf16))
        for parts in zip(*(level.to(self.device).split(1) for level in latents), strict=True):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
                image = network.decode_tiled(parts, tile)[0].float()
            if not torch.isfinite(image).all():  # too large for bfloat16's rounding to survive: once more, in float32
                image = cast(Autoencoder, self._ready("autoencoder", bf16=False)).decode_tiled(parts, tile)[0]
            yield image.cpu()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `flow/`, `autoencoder/` and `pipeline.json`: a directory that can be moved alone."""
        directory = Path(directory)
        claim(directory, "model", "directory")
        self.network.save_pretrained(directory / "flow")
        self.autoencoder.save_pretrained(directory / "autoencoder")
        write_json(
            directory / MANIFEST,
            {
                "format": FORMAT,
                "kind": "pipeline",
                "process": process_to_dict(self.process),
                "scaling": self.scaling.to_dict(),
            },
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, build: Build = build_autoencoder) -> Self:
        """Loads a model directory, or a flow run's `model/`, in eval mode, float32, on the CPU. `build`: see
        `load_autoencoder`.

        Raises UserError where something is missing or does not fit.
        """
        home = Path(directory)
        manifest, stored_network, stored_autoencoder, checkpoint = read_model(home, "train-flow", _read, MANIFEST)
        number = manifest.get("format") if isinstance(manifest, dict) else None
        if not isinstance(number, int):
            raise UserError(f"{home}: {MANIFEST} is damaged; export the model again or copy it whole")
        if number not in range(1, FORMAT + 1):
            raise UserError(
                f"{home}: {MANIFEST} has format {number}, this version reads 1 to {FORMAT}; install a newer one"
            )
        try:
            older = manifest.get("rectified_flow", {"eps": manifest.get("eps")})  # format 1 has eps alone
            process = process_from_dict(manifest.get("process", {"name": "rectified_flow", **older}))
            scaling = LatentScaling.from_dict(manifest["scaling"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{home}: {MANIFEST} is damaged; export the model again or copy it whole") from None
        network = assemble(stored_network, PyramidNCSNpp)
        autoencoder = build(stored_autoencoder)
        if network.levels != autoencoder.levels:
            raise UserError(
                f"{home}: the network's levels {network.levels} are not the autoencoder's {autoencoder.levels}"
            )
        return cls(network, autoencoder, scaling, process, checkpoint=checkpoint)


def _read(home: Path) -> tuple[Any, Stored, Stored, str]:
    """All that a pipeline is made of, before anything is made."""
    return (
        read_json(home / MANIFEST, "copy the model directory whole"),
        read_stored(home / "flow", NCSNppConfig),
        read_autoencoder(home / "autoencoder"),
        sha256(home / "flow" / "model.safetensors")[:16],
    )


def _fill(rows: Tensor, count: int) -> Tensor:
    """As many rows as `count`: the last one repeated."""
    return rows if len(rows) == count else torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32 within: its rounding would pass for a solver's error."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
