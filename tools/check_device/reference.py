"""NumPy float64 references of the layers, forward and backward.

Gradients are those of sum(y * dy).
"""

from __future__ import annotations

import numpy as np

EPS = 1e-5  # of both norms


def depthwise(
    x: np.ndarray, weight: np.ndarray, dy: np.ndarray | None, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute a 3 x 3 depthwise convolution with padding 1, window by window.

    Args:
        x: [B, H, W, C]; weight: [C, 1, 3, 3].
        dy: [B, H', W', C]; None for the output alone, with zeros as gradients.

    Returns:
        y [B, H', W', C], and the gradients of x and weight.
    """
    batch, height, width, channels = x.shape
    padded = np.zeros((batch, height + 2, width + 2, channels))
    padded[:, 1:-1, 1:-1] = x
    taps = weight[:, 0].transpose(1, 2, 0)  # [3, 3, C]
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = np.zeros((batch, rows, columns, channels))
    dx, dw = np.zeros_like(padded), np.zeros(taps.shape)
    for row in range(rows):
        for column in range(columns):
            here = np.s_[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
            y[:, row, column] = (padded[here] * taps).sum((1, 2))
            if dy is not None:
                g = dy[:, row, column][:, None, None]
                dx[here] += g * taps
                dw += (padded[here] * g).sum(0)
    return y, dx[:, 1:-1, 1:-1], dw.transpose(2, 0, 1)[:, None]


def convolution(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, dy: np.ndarray, stride: int, padding: int
) -> tuple[np.ndarray, ...]:
    """Compute a dense convolution, window by window.

    Args:
        x: [B, C, H, W]; weight: [D, C, k, k]; bias: [D]; dy: [B, D, H', W'].

    Returns:
        y, and the gradients of x, weight and bias.
    """
    size, (_, _, height, width) = weight.shape[2], x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    y, dx, dw = np.zeros(dy.shape), np.zeros_like(padded), np.zeros(weight.shape)
    for row in range(dy.shape[2]):
        for column in range(dy.shape[3]):
            top, left = row * stride, column * stride
            here = np.s_[:, :, top : top + size, left : left + size]
            y[:, :, row, column] = np.tensordot(padded[here], weight, ([1, 2, 3],) * 2)
            dx[here] += np.tensordot(dy[:, :, row, column], weight, 1)
            dw += np.tensordot(dy[:, :, row, column], padded[here], [[0], [0]])
    y += bias[:, None, None]
    inner = np.s_[:, :, padding : padding + height, padding : padding + width]
    return y, dx[inner], dw, dy.sum((0, 2, 3))


def normalise(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    dy: np.ndarray,
    axes: tuple[int, ...],
    parameter_axes: tuple[int, ...],
) -> tuple[np.ndarray, ...]:
    """Normalise over some axes: LayerNorm, or BatchNorm in training mode.

    Args:
        x, dy: of the same shape; gamma, beta: [C].
        axes: axes of mean and variance.
        parameter_axes: axes that gamma and beta are shared over.

    Returns:
        y, the gradients of x, gamma and beta, and the mean and variance.
    """
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    gamma, beta = (np.expand_dims(p.astype(np.float64), parameter_axes) for p in (gamma, beta))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    inverse = 1 / np.sqrt(variance + EPS)
    normed = (x - mean) * inverse
    g = dy * gamma
    dx = g - g.mean(axes, keepdims=True) - normed * (g * normed).mean(axes, keepdims=True)
    dgamma, dbeta = (dy * normed).sum(parameter_axes), dy.sum(parameter_axes)
    return normed * gamma + beta, dx * inverse, dgamma, dbeta, mean, variance


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray, scale: float
) -> tuple[np.ndarray, ...]:
    """Return softmax(scale q k^T) v and the gradients of q, k and v, all [B, h, T, C / h]."""
    q, k, v, dy = (each.astype(np.float64) for each in (q, k, v, dy))
    weights = softmax(scale * q @ k.swapaxes(-1, -2))
    dweights = dy @ v.swapaxes(-1, -2)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
    return weights @ v, dscores @ k, dscores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dy


def softmax(x: np.ndarray) -> np.ndarray:
    """Compute softmax along the last axis."""
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def quick_gelu(x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x sigmoid(1.702 x) and the gradient of x."""
    x = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-1.702 * x))
    return x * sigmoid, dy * (sigmoid + 1.702 * x * sigmoid * (1 - sigmoid))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean cross entropy with soft targets [B, C] and the logits' gradient."""
    probabilities = softmax(logits.astype(np.float64))
    loss = -(targets * np.log(probabilities)).sum(1).mean()
    return loss, (probabilities - targets) / len(logits)


def smooth_targets(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    """Return the soft targets [B, classes] of labels [B]."""
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def adamw(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> np.ndarray:
    """Return a weight after a step of `torch.optim.AdamW` for each gradient."""
    weight = weight.astype(np.float64)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for time, gradient in enumerate(gradients, 1):
        weight = weight * (1 - lr * decay)
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        root = np.sqrt(square / (1 - betas[1] ** time)) + eps
        weight = weight - lr * mean / (1 - betas[0] ** time) / root
    return weight


def hash_bits(x: np.ndarray) -> np.ndarray:
    """Compute the hash "lowbias32" of uint32 numbers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x


def random_bits(keys: np.ndarray, slots: int) -> np.ndarray:
    """Return random bits uint32 [slots, B] for uint32 keys [B]."""
    counter = np.arange(slots, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return hash_bits(counter[:, None] ^ hash_bits(keys)[None])


def sample_keys(key: int, count: int) -> np.ndarray:
    """Return a uint32 key for each image of a batch."""
    own = hash_bits(np.array([key], np.uint32))
    return hash_bits(np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9) ^ own)
