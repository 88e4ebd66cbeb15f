"""Networks as OpenVINO runs them: on a CPU faster than PyTorch (BENCHMARKS.md), after some seconds of converting."""

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from pyramid_ldm.condition import Context
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Pyramid

Run = Callable[..., tuple[Tensor, ...]]


class OpenVINO:
    """Converts a network when it is first called, and again when it is called in another way.

    What it computes has the weights of that call, for which no gradients can be had any more. Raises UserError where
    the package is missing.
    """

    def __init__(self) -> None:
        if find_spec("openvino") is None:
            raise UserError("OpenVINO is not installed; pip install 'pyramid-ldm[openvino]'")
        self._way: Hashable = None
        self._run: Run | None = None

    @staticmethod
    def refuse(device: str | torch.device) -> None:
        """UserError on any device but the CPU."""
        if torch.device(device).type != "cpu":
            raise UserError(f"OpenVINO computes on the CPU here, not on {device}; leave one of the two out")

    def evaluate(self, network: nn.Module, noisy: Pyramid, context: Context, bf16: bool) -> Pyramid:
        """What the network says; converted for one number of rows, guidance and precision."""
        way = (network, len(context.label), context.guidance, bf16)
        inputs = (context.label, context.sigma, *noisy)
        if self._run is None or self._way != way:
            self._run = None  # before the next takes memory
            self._run, self._way = converted(Evaluation(network, context.guidance), inputs, bf16), way
        return self._run(*inputs)


def converted(module: nn.Module, example: tuple[Tensor, ...], bf16: bool) -> Run:
    """`module` for tensors of the shapes of `example`, on as many threads as PyTorch has now."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    module.requires_grad_(False)
    with _quietly(), torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(module, tuple(x.clone() for x in example), strict=False)
        # openvino.convert_model does the same, and reports it to Intel.
        decoder = TorchFXPythonDecoder.from_exported_program(program)  # has to live until it is converted
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = request.infer(dict(enumerate(x.numpy() for x in inputs)))
        return tuple(torch.from_numpy(array.copy()) for array in found.values())

    return run


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of its own future, and OpenVINO of operations that it does not miss."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Evaluation(nn.Module):
    """A network that takes and returns tensors, as exporters want it; what else it is told stays as it is."""

    def __init__(self, network: nn.Module, guidance: float = 1.0) -> None:
        super().__init__()
        self.network, self.guidance = network, guidance

    def forward(self, label: Tensor, sigma: Tensor, *noisy: Tensor) -> Pyramid:
        """As `PyramidNCSNpp`'s."""
        found: Pyramid = self.network(noisy, Context(label, sigma, guidance=self.guidance))
        return found
