"""The Frechet distance: closed forms, scipy, torchmetrics, rows in blocks, and memory."""

import importlib
import math
import subprocess
import sys

import fidelity
import numpy as np
import pytest

from dalle_cli.errors import DalleError
from dalle_cli.evaluation.frechet import Moments, between, frechet, quick_frechet


def rotation(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


@pytest.mark.parametrize("distance", [frechet, quick_frechet])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_covariances_with_common_axes_have_a_closed_form(size, distance):
    rng = np.random.default_rng(size)
    axes, a, b = rotation(rng, size), rng.uniform(0.1, 5, size), rng.uniform(0.1, 5, size)
    m, n = rng.standard_normal((2, size))
    expected = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = distance(m, (axes * a) @ axes.T, n, (axes * b) @ axes.T)
    assert found == pytest.approx(expected, rel=1e-6 / 2)


def test_two_dimensions_have_a_closed_form():
    """For 2 x 2, tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A B)), whatever the axes."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = ((lambda x: x @ x.T)(rng.standard_normal((2, 2))) for _ in range(2))
        root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
        expected = np.trace(a) + np.trace(b) - 2 * root
        assert frechet(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-6)


def test_equal_gaussians_are_at_no_distance_even_where_the_covariance_is_singular():
    x = np.random.default_rng(1).standard_normal((10, 30))
    moments = Moments.of([x], 30)
    assert np.linalg.matrix_rank(moments.covariance) == 9
    scale = np.trace(moments.covariance)
    assert between(moments, moments) < 1e-12 * scale
    assert quick_frechet(moments.mean, moments.covariance, moments.mean, moments.covariance) < 1e-6 * scale


def test_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 24)), rng.standard_normal((150, 24)) + 0.3
    a, b = Moments.of([x], 24), Moments.of([y], 24)
    p, q = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.trace(linalg.sqrtm(p @ q)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(p) + np.trace(q) - 2 * root
    assert between(a, b) == pytest.approx(expected, rel=1e-9)
    assert quick_frechet(a.mean, a.covariance, b.mean, b.covariance) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics_on_equal_features():
    torch = pytest.importorskip("torch")
    fidelity.importable()
    pytest.importorskip("torchmetrics")
    fid = importlib.import_module("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1).double()

    rng = np.random.default_rng(3)
    x, y = (rng.integers(low, 256, (90, 3, 2, 2)).astype(np.uint8) for low in (0, 60))
    metric = fid.FrechetInceptionDistance(feature=Flat(), normalize=False, input_img_size=(3, 2, 2)).set_dtype(
        torch.double
    )
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    a, b = (Moments.of([z.reshape(90, 12)], 12) for z in (x, y))
    assert between(a, b) == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_blocks_give_the_moments_of_all_rows(size, offset):
    x = np.random.default_rng(4).standard_normal((100, 5)) + offset
    found = Moments.of((x[i : i + size] for i in range(0, 100, size)), 5)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=0, atol=1e-9)


def test_rows_of_float16_are_summed_in_float64():
    x = np.full((4096, 1), 60_000, np.float16)
    x[::2] = 59_968
    found = Moments.of([x], 1)
    assert found.mean[0] == 59_984
    assert found.covariance[0, 0] == pytest.approx(256 * 4096 / 4095)


def test_faults_are_one_line():
    moments = Moments(2)
    with pytest.raises(DalleError, match="at least 2 images"):
        _ = moments.covariance
    with pytest.raises(DalleError, match="finite features"):
        moments.add(np.array([[1.0, np.nan]]))


MEASURE = """
import resource, sys
import numpy as np
from pathlib import Path
from dalle_cli.artifacts import ShardWriter, open_artifact
from dalle_cli.evaluation.frechet import Moments
from dalle_cli.evaluation.store import FeatureRows
out, n, width = Path(sys.argv[1]), int(sys.argv[2]), 256
writer = ShardWriter(out, "embeddings", n, 1024, {}, [])
for i in writer.missing():
    low, high = writer.bounds(i)
    rows = np.random.default_rng(i).standard_normal((high - low, width)).astype(np.float32)
    writer.write(i, {"embeddings": rows, "ids": [str(k) for k in range(low, high)]})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moments = Moments.of(FeatureRows(open_artifact(out)).blocks(), width)
assert moments.count == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """Of the whole process, mapped pages included: 4 MiB of features, and 32 MiB."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEASURE, str(tmp_path / n), n], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in ("4096", "32768")
    ]
    assert peaks[1] - peaks[0] < 6 * 1024, peaks  # KiB; all of the second's features would be 28 MiB more
