"""How many of its codes a tokenizer uses. The squared error may not show that a codebook has collapsed; usage does.

Papers define "usage" in three ways that give different values. Each definition is a metric with its own name.
"""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import binom

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib.features import chunks, side_by_side

BATCH = 256  # images per batch of `usage_batch`
RECENT = 65536  # tokens that `usage_recent` counts


def evaluate(context: Context, *, examples: int | None = None) -> Result:
    """The test split, or its first `examples`.

    usage_batch: percent of the codes that occur in 256 images, mean over full batches (Yu et al. 2022, arXiv:2110.04627).
    usage_recent: percent of the codes that occur among the last 65,536 tokens (at most all), as the code of LlamaGen logs it.
    usage: percent of the codes that occur in the split.
    entropy: entropy of the code frequencies, in bits.
    perplexity: 2^entropy, between 1 and the number of codes.
    perplexity_share: perplexity in percent of that of equally many uniform samples; 100 for uniform use at any sample size.
    """
    tokens, codes = extract_tokens(context, "test", examples), context.model.codes
    counts = histogram(tokens, codes)
    whole = max(len(tokens) // BATCH, 1) * BATCH
    batches = [used(tokens[start:stop], codes) for start, stop in chunks(min(whole, len(tokens)), BATCH)]
    bits = entropy(counts)
    metrics = {
        "usage_batch": np.mean(batches),
        "usage_recent": used(tokens.ravel()[-RECENT:], codes),
        "usage": used(tokens, codes),
        "entropy": bits,
        "perplexity": 2**bits,
        "perplexity_share": 100 * 2**bits / uniform_perplexity(tokens.size, codes),
    }
    protocol = (
        f"codebook of {codes} codes, {tokens.shape[1]} tokens an image, {context.name('test', len(tokens))};"
        f" usage_batch of {len(batches)} x {min(BATCH, len(tokens))} images, usage_recent of {min(RECENT, tokens.size)} tokens"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol, plot(counts))


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("number of test images, the first ones; None: all", least=1)}, needs=("tokens",)
)


def extract_tokens(context: Context, split: str, count: int | None = None) -> np.ndarray:
    """Tokens [N, T] int64 of the images of a split, each in row-major order."""
    rows = context.encode_with(lambda images: {"tokens": side_by_side(context.model.fns.tokens(images))}, split, "tokens", count).x
    return rows.astype(np.int64)  # float32 holds integers up to 2^24 exactly


def histogram(tokens: np.ndarray, codes: int) -> np.ndarray:
    """Number of occurrences of each code, [codes]."""
    return np.bincount(np.ravel(tokens), minlength=codes)


def plot(counts: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]. Left: one square per code in codebook order, gray for unused codes. Right: sorted counts and their mean."""
    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    squares, curve = figure.subplots(1, 2)
    side = int(np.ceil(np.sqrt(len(counts))))
    cells = np.full(side * side, np.nan)
    cells[: len(counts)] = counts
    shown = squares.imshow(np.ma.masked_less(np.ma.masked_invalid(cells.reshape(side, side)), 1), norm="log", vmin=1)
    squares.set(title=f"{np.count_nonzero(counts):,} of {len(counts):,} codes occur", xticks=[], yticks=[], facecolor="lightgrey")
    figure.colorbar(shown, ax=squares, label="times")
    curve.plot(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], label="codes")
    curve.axhline(counts.mean(), color="gray", linestyle="--", label="uniform")
    curve.set(xlabel="codes, the most frequent first", ylabel="times", yscale="symlog", ylim=(0, None))
    curve.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def used(tokens: np.ndarray, codes: int) -> float:
    """Percent of the codes that occur in `tokens`."""
    return 100 * np.count_nonzero(histogram(tokens, codes)) / codes


def entropy(counts: np.ndarray) -> float:
    """Entropy of the frequencies counts / sum(counts), in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def uniform_perplexity(draws: int, codes: int) -> float:
    """2^E[entropy] of the frequencies in `draws` uniform samples; below `codes`: 941 for 1024 samples of 8192 codes."""
    low, high = binom.ppf((1e-12, 1 - 1e-12), draws, 1 / codes)
    times = np.arange(max(low, 1), high + 1)
    expected = codes * np.sum(binom.pmf(times, draws, 1 / codes) * times * np.log2(times)) / draws
    return float(2 ** (np.log2(draws) - expected))
