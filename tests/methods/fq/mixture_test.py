"""EM on histograms beside scikit-learn, and beside EM on the weights in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from quantjax.methods.fq import mixture as mixture_lib
from quantjax.methods.fq.mixture import Mixture, assign, fit_mixture, regions, separation
from tests.methods import golden

SIZE = 16384  # of all samples, filled up with zeros: one compiled program


def synthetic():
    rng = np.random.default_rng(0)
    for i in range(20):
        n = int(rng.integers(200, 5000))
        if i % 4 == 0:
            w = np.concatenate([rng.normal(-1, 0.3, 2 * n), rng.normal(1.2, 0.5, n)])
        else:
            kinds = rng.normal, rng.laplace, lambda size: rng.standard_t(3, size)
            w = kinds[i % 4 - 1](size=3 * n)
            w = w[np.abs(w) > np.quantile(np.abs(w), rng.uniform(0.5, 0.9))]
        yield f"synthetic {i}", w * 10.0 ** rng.integers(-3, 2)


def trained():
    arrays = golden.load("ResNet82_state_dict.npz")
    kernels = [name for name in arrays.files if arrays[name].ndim == 4]
    for name in kernels[:20]:
        w = arrays[name].ravel()
        yield name, w[np.abs(w) > np.quantile(np.abs(w), 0.8)]


def padded(w):
    w = w[:SIZE].astype(np.float32)
    return np.concatenate([w, np.zeros(SIZE - w.size, np.float32)]), w


def scores(w, mixture):
    mean, std, weight = (np.float64(part) for part in mixture)
    square = ((np.float64(w)[:, None] - mean) / std) ** 2
    return np.log(weight) - np.log(std) - 0.5 * (square + np.log(2 * np.pi))


def log_likelihood(w, mixture):
    return np.logaddexp(*scores(w, mixture).T).mean()


def em(w, iterations=3000):
    """FQ 4, on the weights themselves in float64: started from the signs, weights 1/2."""
    w = np.float64(w)
    parts = w[w < 0], w[w > 0]
    mixture = [p.mean() for p in parts], [p.std() for p in parts], [0.5, 0.5]
    before = -np.inf
    for _ in range(iterations):
        score = scores(w, mixture)
        now = np.logaddexp(*score.T)
        r = np.exp(score - now[:, None])
        n = r.sum(0)
        mean = (r * w[:, None]).sum(0) / n
        std = np.sqrt((r * (w[:, None] - mean) ** 2).sum(0) / n)
        mixture = mean, std, n / w.size
        if now.mean() - before < 1e-12:
            break
        before = now.mean()
    order = np.argsort(mixture[0])  # those of a heavy tail may have crossed
    return tuple(part[order] for part in mixture)


def by_sklearn(w):
    parts = w[w < 0], w[w > 0]
    model = GaussianMixture(
        2,
        tol=1e-8,
        max_iter=3000,
        reg_covar=1e-9 * w.var(),
        means_init=[[p.mean()] for p in parts],
        precisions_init=[[[1 / p.var()]] for p in parts],
        weights_init=[0.5, 0.5],
    ).fit(np.float64(w)[:, None])
    return model.means_[:, 0], np.sqrt(model.covariances_[:, 0, 0]), model.weights_


@pytest.mark.parametrize("source", [synthetic, trained])
def test_as_likely_as_what_scikit_learn_finds(source):
    layers = list(source())
    assert len(layers) == 20
    for name, w in layers:
        filled, w = padded(w)
        ours = log_likelihood(w, fit_mixture(filled))
        assert ours > log_likelihood(w, by_sklearn(w)) - 1e-6, name  # the bar is 1e-4


@pytest.mark.parametrize("source", [synthetic, trained])
def test_the_error_of_the_histogram(source):
    """Beside EM on the weights: means and stds to 0.2 percent of a std, and as likely."""
    for name, w in source():
        filled, w = padded(w)
        ours, exact = fit_mixture(filled), em(w)
        for part, of_em in zip(ours[:2], exact[:2], strict=True):
            assert np.all(np.abs(part - of_em) < 2e-3 * exact[1]), name
        np.testing.assert_allclose(ours.weight, exact[2], atol=1e-3)
        assert log_likelihood(w, ours) > log_likelihood(w, exact) - 1e-6


def test_zeros_and_masked_weights_do_not_count():
    _, w = next(synthetic())
    filled, _ = padded(w)
    other = np.where(filled == 0, 7.0, filled).astype(np.float32)
    for a, b in zip(fit_mixture(other, filled != 0), fit_mixture(filled), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)  # bins are counted from the largest, 7


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 1\) beside weights \(3, 4\)"):
        fit_mixture(jnp.ones((3, 4)), jnp.ones((3, 1), bool))


def test_layers_fitted_together_are_the_layers_fitted_apart():
    layers = [padded(w)[0] for _, w in list(synthetic())[:4]]
    hists = [jax.jit(mixture_lib.histogram)(w) for w in layers]
    together = mixture_lib.fit(jax.tree.map(lambda *parts: jnp.stack(parts), *hists))
    for i, w in enumerate(layers):
        for part, alone in zip(together, fit_mixture(w), strict=True):
            np.testing.assert_allclose(part[i], alone, rtol=1e-4)


@pytest.mark.parametrize("size", [SIZE, 1 << 21])
def test_the_histogram_does_not_depend_on_the_order(size):
    """So its sums are the same on every mesh, and so is what is fitted to them."""
    w = np.random.default_rng(0).standard_t(2, size).astype(np.float32)
    for a, b in zip(*(jax.jit(mixture_lib.histogram)(x) for x in (w, np.sort(w))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [SIZE, 1 << 21])
def test_the_histogram_keeps_the_moments(size):
    w = np.random.default_rng(0).normal(size=(size,)).astype(np.float32) + 0.3
    hist = jax.jit(mixture_lib.histogram)(w)
    assert float(hist.count.sum()) == size
    exact = np.float64(w)
    assert float((hist.count * hist.mean).sum()) == pytest.approx(exact.sum(), rel=1e-5)
    moments = mixture_lib.moments(hist)
    assert float(moments.variance) == pytest.approx(exact.var(), rel=1e-5)
    assert (int(moments.count), int(moments.negative)) == (size, np.sum(w < 0))


@pytest.mark.parametrize(
    "w", [np.zeros(SIZE), np.ones(SIZE), np.repeat([-0.5, 0.5], SIZE // 2), np.eye(128) * 1e15]
)
def test_degenerate_layers_are_finite(w):
    for part in fit_mixture(jnp.asarray(w.ravel(), jnp.float32)):
        assert np.all(np.isfinite(part))


def test_equal_weights_have_no_variance():
    hist = jax.jit(mixture_lib.histogram)(np.full(1 << 21, 0.3, np.float32))
    assert float(mixture_lib.moments(hist).variance) == 0


def test_two_spikes():
    mixture = fit_mixture(jnp.asarray(np.repeat([-0.5, 0.25], SIZE // 2), jnp.float32))
    np.testing.assert_allclose(mixture.mean, [-0.5, 0.25], rtol=1e-6)
    assert np.all(mixture.std < 1e-3)


def test_separation_is_its_equation():
    mixture = Mixture(*(jnp.asarray(v) for v in ([-1.0, 2.0], [0.5, 1.5], [0.5, 0.5])))
    assert float(separation(mixture, 4.0)) == pytest.approx((9 + 1) / 4)
    assert float(separation(mixture, 0.0)) == 0


def random_mixtures(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        scale = 10.0 ** rng.integers(-4, 2)
        mean = np.sort(rng.normal(size=2)) * scale
        std = np.exp(rng.normal(size=2)) * scale
        std = std[[0, 0]] if i % 5 == 0 else std
        mean = mean[[0, 0]] if i % 7 == 0 else mean
        share = rng.random()
        x = rng.normal(size=400) * std.max() * 4 + mean.mean()
        yield Mixture(*map(jnp.float32, (mean, std, [share, 1 - share]))), np.float32(x)


def test_regions_are_where_the_posterior_is_larger():
    find = jax.jit(regions)
    for mixture, x in random_mixtures(60):
        border, inside = find(mixture)
        ours = ((x > border[0]) & (x < border[1])) == inside
        score = scores(x, mixture)
        ratio = score[:, 1] - score[:, 0]
        sure = np.abs(ratio) > 1e-3
        np.testing.assert_array_equal(ours[sure], ratio[sure] > 0)
        chosen = np.asarray(assign(None, x, mixture))
        np.testing.assert_array_equal(chosen[sure], np.where(ratio > 0, 1, -1)[sure])


def test_components_are_drawn_from_the_posterior():
    mixture = Mixture(*map(jnp.float32, ([-1.0, 1.0], [1.0, 0.7], [0.4, 0.6])))
    x = jnp.repeat(jnp.linspace(-1, 1, 8), 4000)
    drawn = np.asarray(assign(jax.random.key(0), x, mixture))
    assert drawn.dtype == np.int8
    assert set(np.unique(drawn)) == {-1, 1}
    score = scores(np.asarray(x[::4000]), mixture)
    posterior = 1 / (1 + np.exp(score[:, 0] - score[:, 1]))
    share = (drawn > 0).reshape(8, 4000).mean(1)
    assert np.all(
        np.abs(share - posterior) < 5 * np.sqrt(posterior * (1 - posterior) / 4000) + 1e-9
    )
