"""From noise to images: what `pyramid-ldm sample` and a notebook use."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.config import AutoencoderConfig, FlowConfig
from pyramid_ldm.data.images import to_pil
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, sha256, write_json
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.nn.layers import to_bfloat16
from pyramid_ldm.ownership import claim
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import Progress, Solution, dopri5, euler, rk45
from pyramid_ldm.pyramid import LatentScaling, Pyramid, pyramid_noise
from pyramid_ldm.serialization import Stored, assemble, read_model, read_stored

FORMAT = 3
MANIFEST = "pipeline.json"
SOLVERS = ("rk45", "euler", "dopri5")  # dopri5: torchdiffeq's, one step size for a batch
TILE = {"cpu": 512}  # what its caches like; other devices decode a 2K image whole


@dataclass(frozen=True)
class PipelineOutput:
    """Samples of one call (or one batch of it)."""

    images: list[Image.Image]
    latents: Pyramid  # raw (unscaled), (N, C_i, H/f_i, W/f_i), on the CPU
    nfe: int  # velocity evaluations; the mean over images, rounded
    image_nfe: tuple[int, ...]  # those of each image (RK45 takes another step size for each)


@dataclass(frozen=True)
class SolverOptions:
    """How the flow is solved. `steps` is Euler's; the tolerances are RK45's. `max_nfe`: evaluations after which it
    gives up; None: 2000, or as many as Euler's steps.

    bf16: whether velocities are computed in bfloat16. None: as the decoder for Euler, no for adaptive steps, which
    would take its rounding for error.
    """

    solver: str = "rk45"
    steps: int = 200
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int | None = None
    bf16: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"solver is {self.solver!r}; choose {' or '.join(SOLVERS)}")
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise UserError(f"rtol is {self.rtol:g}, atol {self.atol:g}; both must be finite and above 0")
        if min(self.steps, self.most) < 1:
            raise UserError(f"steps is {self.steps}, max_nfe {self.most}; both must be at least 1")
        if self.solver == "euler" and self.most < self.steps:
            raise UserError(
                f"Euler with --steps {self.steps} takes {self.steps} evaluations, more than --max-nfe {self.most}; "
                f"lower the one or raise the other"
            )

    @property
    def most(self) -> int:
        """`max_nfe`, or what stands for None."""
        return self.max_nfe if self.max_nfe is not None else max(2_000, self.steps if self.solver == "euler" else 0)

    def record(self, bf16: bool) -> dict[str, object]:
        """What a sample depends on besides its noise and the networks; `bf16`: of the decoder."""
        flow = self.flow_in_bf16(bf16)
        how: dict[str, object] = {"steps": self.steps} if self.solver == "euler" else {
            "rtol": self.rtol, "atol": self.atol
        }  # fmt: skip
        words = {True: "bf16", False: "fp32"}
        return {"solver": self.solver, **how, "precision": f"flow {words[flow]}, decoder {words[bf16]}"}

    def flow_in_bf16(self, bf16: bool) -> bool:
        """Whether velocities are computed in bfloat16, where the decoder is or is not."""
        return self.bf16 if self.bf16 is not None else bf16 and self.solver == "euler"


class PyramidPipeline:
    """A flow network, the autoencoder whose latents it learned, and the scaling between them.

    Args:
        objective: what the flow network was trained for; says where sampling starts (PDM section 4.2).
        checkpoint: identifies the flow weights, for the record of a sample.
    """

    def __init__(
        self,
        flow: PyramidNCSNpp,
        autoencoder: PyramidAutoencoder,
        scaling: LatentScaling,
        objective: RectifiedFlow | None = None,
        *,
        checkpoint: str = "",
    ) -> None:
        self.flow, self.autoencoder = flow.eval(), autoencoder.eval()
        self.scaling, self.objective, self.checkpoint = scaling, objective or RectifiedFlow(), checkpoint
        self.device = torch.device("cpu")
        self._compiled = False
        self._bf16: dict[str, nn.Module] = {}  # copies with bfloat16 weights, made when first used

    def to(self, device: str | torch.device) -> Self:
        """Moves both networks; returns self."""
        self.device = torch.device(device)
        self._bf16.clear()
        for network in (self.flow, self.autoencoder):
            network.to(self.device).to(memory_format=torch.channels_last)
        return self

    def compile(self) -> Self:
        """Compiles the flow network at its first use, for one batch size (on CUDA, as CUDA graphs): minutes then,
        faster steps ever after. Returns self."""
        self._compiled = True
        self._bf16.clear()
        return self

    def _network(self, name: str, bf16: bool) -> nn.Module:
        network: nn.Module = getattr(self, name)
        if bf16:
            if name not in self._bf16:
                self._bf16[name] = to_bfloat16(network).to(memory_format=torch.channels_last)
            network = self._bf16[name]
        if self._compiled and name == "flow" and network._compiled_call_impl is None:
            network.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        return network

    def __call__(
        self,
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        solver: str = "rk45",
        steps: int = 200,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_nfe: int | None = None,
        batch_size: int = 8,
        bf16: bool = False,
    ) -> PipelineOutput:
        """Draws images `first_index`, `first_index` + 1, ... of `seed`.

        Image k of a seed has the same initial noise whatever the batch size. `bf16` computes the decoder, and with
        Euler the flow, in bfloat16; the solver's state stays float32. Raises UserError where the solve cannot
        go on.
        """
        options = SolverOptions(solver, steps, rtol, atol, max_nfe)
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
        if not indices or batch_size < 1:
            raise UserError("num_images and batch_size must be at least 1")
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            noise = pyramid_noise(self.flow.shapes, seed, "sample", chosen)
            rows = min(batch_size, len(indices))
            solution = self.solve(noise, options, bf16=bf16, progress=progress, rows=rows)
            latents = self.scaling.unscale(solution.latents)
            images = [to_pil(image) for image in self.decode(latents, bf16=bf16)]
            nfe = round(sum(solution.sample_nfe) / len(chosen))
            yield PipelineOutput(images, tuple(level.cpu() for level in latents), nfe, solution.sample_nfe)

    @torch.inference_mode()
    def solve(
        self,
        noise: Pyramid,
        options: SolverOptions,
        *,
        bf16: bool = False,
        progress: Progress | None = None,
        rows: int = 0,
    ) -> Solution:
        """Scaled latents at t = 1 from noise at t = eps. A compiled network always sees at least `rows` samples."""
        noise = tuple(level.to(self.device) for level in noise)
        rows = max(rows, noise[0].shape[0])
        flow_bf16 = options.flow_in_bf16(bf16)
        network = self._network("flow", flow_bf16)

        def velocity(latents: Pyramid, t: Tensor) -> Pyramid:
            present = len(t)
            if self._compiled:  # for one batch size: fill up where samples have finished, or are few
                latents, t = tuple(_fill(level, rows) for level in latents), _fill(t, rows)
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=flow_bf16):
                result: Pyramid = network(latents, t)
            return tuple(level[:present] for level in result)

        common: dict[str, Any] = {"eps": self.objective.eps, "max_nfe": options.most, "progress": progress}
        if options.solver == "euler":
            field = self.objective.field(velocity, options.steps)
            return euler(field, noise, steps=options.steps, **common)
        field = self.objective.field(velocity)
        solver = rk45 if options.solver == "rk45" else dopri5
        with _exact_float32():
            return solver(field, noise, rtol=options.rtol, atol=options.atol, **common)

    @torch.inference_mode()
    def decode(self, latents: Pyramid, *, bf16: bool = False) -> Iterator[Tensor]:
        """Raw latents to images (3, H, W) in [-1, 1], one at a time: a 2K image needs the memory of one."""
        tile = TILE.get(self.device.type, 2048)
        network = cast(PyramidAutoencoder, self._network("autoencoder", bf16))
        for parts in zip(*(level.to(self.device).split(1) for level in latents), strict=True):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
                image = network.decode_tiled(parts, tile)[0].float()
            if not torch.isfinite(image).all():  # too large for bfloat16's rounding to survive: once more, in float32
                image = self.autoencoder.decode_tiled(parts, tile)[0]
            yield image.cpu()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `flow/`, `autoencoder/` and `pipeline.json`: a directory that can be moved alone."""
        directory = Path(directory)
        claim(directory, "model", "directory")
        self.flow.save_pretrained(directory / "flow")
        self.autoencoder.save_pretrained(directory / "autoencoder")
        write_json(
            directory / MANIFEST,
            {
                "format": FORMAT,
                "kind": "pipeline",
                "rectified_flow": asdict(self.objective),
                "scaling": self.scaling.to_dict(),
            },
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads a model directory, or a flow run's `model/`, in eval mode, float32, on the CPU.

        Raises UserError where something is missing or does not fit.
        """
        home = Path(directory)
        manifest, stored_flow, stored_autoencoder, checkpoint = read_model(home, "train-flow", _read, MANIFEST)
        number = manifest.get("format") if isinstance(manifest, dict) else None
        if not isinstance(number, int):
            raise UserError(f"{home}: {MANIFEST} is damaged; export the model again or copy it whole")
        if number not in range(1, FORMAT + 1):
            raise UserError(
                f"{home}: {MANIFEST} has format {number}, this version reads 1 to {FORMAT}; install a newer one"
            )
        try:
            objective = manifest.get("rectified_flow", {"eps": manifest.get("eps")})  # format 1 has eps alone
            scaling, flow_objective = LatentScaling.from_dict(manifest["scaling"]), RectifiedFlow(**objective)
        except (KeyError, TypeError):
            raise UserError(f"{home}: {MANIFEST} is damaged; export the model again or copy it whole") from None
        flow = assemble(stored_flow, PyramidNCSNpp)
        autoencoder = assemble(stored_autoencoder, PyramidAutoencoder)
        if flow.levels != autoencoder.levels:
            raise UserError(f"{home}: the flow's levels {flow.levels} are not the autoencoder's {autoencoder.levels}")
        return cls(flow, autoencoder, scaling, flow_objective, checkpoint=checkpoint)


def _read(home: Path) -> tuple[Any, Stored, Stored, str]:
    """All that a pipeline is made of, before anything is made."""
    return (
        read_json(home / MANIFEST, "copy the model directory whole"),
        read_stored(home / "flow", FlowConfig),
        read_stored(home / "autoencoder", AutoencoderConfig),
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
