"""FID's parts: statistics files, and what the extractor is shown."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.frechet import frechet_distance, moments, read_statistics
from metaflowmaps.metrics.inception import Inception


def features(n, d=6, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + shift


def stored(path, x):
    x = x.double().numpy()
    np.savez(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    return path


def test_a_statistics_file_stands_for_its_features(tmp_path):
    x, y = features(50), features(70, seed=1, shift=0.5)
    file = stored(tmp_path / "y.npz", y)
    # two factorisations of one covariance in float64
    assert frechet_distance(x, read_statistics(file)) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert frechet_distance(read_statistics(file), y) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_it_is_the_textbook_formula(tmp_path):
    x, y = features(40).double(), features(60, seed=2, shift=1.0).double()
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    values = np.linalg.eigvals(a @ b)  # those of the root's square: real and >= 0 up to rounding
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.sqrt(values.real.clip(0)).sum()
    found = frechet_distance(x, read_statistics(stored(tmp_path / "y.npz", y)))
    assert found == pytest.approx(float(expected), rel=1e-6)  # eigenvalues of a product that is not symmetric


def test_singular_statistics_need_no_care(tmp_path):
    few = features(4)  # covariance of rank 3 in six dimensions
    file = stored(tmp_path / "few.npz", few)
    assert frechet_distance(few, read_statistics(file)) == pytest.approx(0, abs=1e-6)  # roots of rounding errors


def test_what_is_no_statistics_file_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "text.npz").write_text("no")
    for name, words in (
        ("other", "mu"),
        ("shape", r"\(2, 2\)"),
        ("text", "no statistics file"),
        ("none", "no statistics"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="6 and 3"):
        frechet_distance(features(9), read_statistics(tmp_path / "three.npz"))


def test_pickled_statistics_are_refused_with_the_way_to_convert(tmp_path):
    file = tmp_path / "edm2.pkl"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"numpy\.savez\('stats\.npz'"):
        read_statistics(file)


class _Extractor(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.asked, self.path, self.seen = features_list, feature_extractor_weights_path, []

    def forward(self, x):
        self.seen.append(x)
        return (x.float().mean((2, 3)),)


@pytest.fixture
def fidelity(monkeypatch):
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = _Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_the_extractor_is_shown_eight_bits(fidelity, tmp_path):
    (tmp_path / "weights.pth").touch()
    inception = Inception(tmp_path / "weights.pth")
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.7]).reshape(1, 1, 1, 5).expand(1, 3, 2, 5)
    out = inception.features(x)
    (seen,) = inception.extractor.seen
    assert seen.dtype == torch.uint8
    assert seen[0, 0, 0].tolist() == [0, 64, 128, 255, 255]
    assert inception.extractor.asked == ["2048"]
    assert inception.extractor.path == str(tmp_path / "weights.pth")
    torch.testing.assert_close(out, torch.full((1, 3), (0 + 64 + 128 + 255 + 255) / 5))
    with pytest.raises(InputError, match="colour pictures"):
        inception.features(torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="no such file"):
        Inception(tmp_path / "none.pth")


def test_without_torch_fidelity_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"pip install 'metaflowmaps\[metrics\]'"):
        Inception()
