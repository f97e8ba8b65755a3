"""Parts of the comparison of pictures, pixel by pixel in float64, from their definitions."""

import numpy as np


def window(image, left, right, top, bottom):
    """(C, n, n): the window stretched to n x n by bilinear interpolation between pixel centers."""
    n = image.shape[-1]
    out = np.zeros_like(image)
    for i in range(n):
        for j in range(n):
            y = np.clip((top + (i + 0.5) / n * (1 - top - bottom)) * n - 0.5, 0, n - 1)
            x = np.clip((left + (j + 0.5) / n * (1 - left - right)) * n - 0.5, 0, n - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, n - 1), min(x0 + 1, n - 1)
            fy, fx = y - y0, x - x0
            out[:, i, j] = (1 - fy) * ((1 - fx) * image[:, y0, x0] + fx * image[:, y0, x1]) + fy * (
                (1 - fx) * image[:, y1, x0] + fx * image[:, y1, x1]
            )
    return out


def recolored(part, whole, stiff):
    """(3, n, n) each: ridge regression of the centered colors as ordinary least squares on three more rows of data."""
    x, y = (image.reshape(3, -1).T for image in (part, whole))
    xc, yc = x - x.mean(0), y - y.mean(0)
    more = np.sqrt(stiff * len(x)) * np.eye(3)
    table = np.linalg.lstsq(np.concatenate([xc, more]), np.concatenate([yc, more]), rcond=None)[0]
    return (xc @ table + y.mean(0)).T.reshape(part.shape)


def agreement(a, b, block, stiff, noise, off, moved):
    """(3, n, n) aligned pictures -> (n / block, n / block), each block by loops over its pixels."""
    mapped = recolored(b, a, stiff)
    luma = np.array([0.299, 0.587, 0.114])
    count = a.shape[-1] // block
    out = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            here = (slice(None), slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            p, q = (np.einsum("cyx,c->yx", x[here], luma).ravel() for x in (a, mapped))
            covariance = np.cov(p, q, bias=True)
            structure = (2 * covariance[0, 1] + noise) / (covariance[0, 0] + covariance[1, 1] + noise)
            colors = [x[here].mean((1, 2)) for x in (a, b, mapped)]
            away = [((colors[0] - color) ** 2).sum() for color in colors[1:]]
            out[i, j] = structure / (1 + away[1] / off**2 + away[0] / moved**2)
    return out
