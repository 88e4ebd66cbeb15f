import numpy as np
import pytest
import torch

from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance


def moments(mean, covariance, count=1000):
    """Of exactly this mean and covariance."""
    mean, covariance = np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float)
    return Moments(count, mean * count, covariance * (count - 1) + count * np.outer(mean, mean))


def test_distance_of_known_gaussians():
    """In one dimension (m1 - m2)^2 + (s1 - s2)^2; independent dimensions add."""
    assert frechet_distance(moments([1], [[4]]), moments([4], [[1]])) == pytest.approx(10)
    a, b = moments([0, 0], np.diag([1, 9])), moments([1, 2], np.diag([4, 1]))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 4)


def test_distance_where_covariances_do_not_commute():
    """Against the general formula with scipy's matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    first, second = (m @ m.T for m in rng.normal(size=(2, 5, 5)))
    expected = np.trace(first + second - 2 * np.real(linalg.sqrtm(first @ second)))
    assert frechet_distance(moments(np.zeros(5), first), moments(np.zeros(5), second)) == pytest.approx(expected)


def test_a_set_is_at_no_distance_from_itself_and_batches_do_not_matter():
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 3
    whole, parts = Moments.of([features]), Moments.of(features.split(7))
    assert np.allclose(parts.mean, features.double().mean(dim=0))
    assert np.allclose(parts.covariance, np.cov(features.double().numpy().T))
    assert abs(frechet_distance(whole, parts)) < 1e-6


def test_two_images_at_least():
    with pytest.raises(ValueError, match="1 images"):
        _ = Moments.of([torch.ones(1, 4)]).covariance


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 60, 4, generator=generator) for _ in range(200)]
    same = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5
    shifted = torch.tensor([kernel_distance(a, b + 0.5) for a, b in draws])
    assert shifted.mean() > 5 * same.std()


def test_kernel_distance_by_hand():
    """k(0, y) = 1; k(1, 1) = 8: (1 + 8) - 2 * 1 with two equal rows on each side."""
    assert kernel_distance(torch.zeros(2, 1), torch.ones(2, 1)) == pytest.approx(1 + 8 - 2)


class Bytes(torch.nn.Module):
    def forward(self, image: torch.Tensor, return_features: bool) -> torch.Tensor:
        assert image.dtype == torch.uint8
        assert image.shape[2] == 299
        return image.float().mean(dim=(2, 3))


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 299
        return (x * 128 + 128).mean(dim=(2, 3))


@pytest.mark.parametrize("stub", [Bytes, Scaled])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_images_arrive_at_299_pixels_as_the_network_expects_them(tmp_path, stub):
    torch.jit.script(stub()).save(str(tmp_path / "net.pt"))
    network = Inception(tmp_path / "net.pt", torch.device("cpu"))
    images = torch.stack([torch.full((3, 40, 60), value) for value in (-1.0, 0.0, 3.0)])
    assert network(images)[:, 0].tolist() == pytest.approx([0, 128, 255])


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Inception(tmp_path / "none.pt", torch.device("cpu"))
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.pt: is not a TorchScript network"):
        Inception(tmp_path / "bad.pt", torch.device("cpu"))
