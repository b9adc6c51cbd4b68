"""log Σ w_i p(y_i|x) and the logit margin, by hand and at their extremes."""

import math

import pytest
import torch
from torch import nn

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.checkpoint import load_classifier
from metaflowmaps.rewards import ClassifierMixture, LogitMargin

W = normal(2, 4, seed="W")
X = normal(5, 2)


def classifier(x):
    return (x @ W.to(x)).tanh() * 3


def as_logits(x):
    """The sample is its own logits."""
    return x


def probabilities(x):
    """softmax in plain Python, a list a row."""
    rows = []
    for logits in classifier(x).tolist():
        raw = [math.exp(v) for v in logits]
        rows.append([v / sum(raw) for v in raw])
    return rows


# -- mixture ---------------------------------------------------------------------------------------------------------


def test_mixture_by_hand():
    expected = [1.3 * math.log(0.2 * p[0] + 0.5 * p[2] + 0.3 * p[3]) for p in probabilities(X)]
    value = ClassifierMixture(classifier, [0.2, 0.0, 0.5, 0.3], strength=1.3)(X)
    # logarithms of order 1, of sums rounded a few times
    torch.testing.assert_close(value, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-14)


def test_one_class_is_its_log_probability():
    for label in range(4):
        value = ClassifierMixture(classifier, torch.eye(4)[label])(X)
        assert torch.equal(value, classifier(X).log_softmax(1)[:, label])  # log 1 = 0 is added


def test_all_classes_alike_say_nothing():
    x = X.clone().requires_grad_()
    value = ClassifierMixture(classifier, torch.ones(4))(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    # probabilities sum to 1 within a few roundings
    torch.testing.assert_close(value, torch.full((5,), -math.log(4), dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-300, 0.25, 8.0, 1e300, 1.7e308])
def test_only_ratios_of_weights_matter(scale):
    weights = torch.tensor([0.25, 0.0, 0.5, 1.0], dtype=F64)
    one, other = (ClassifierMixture(classifier, w)(X) for w in (weights, weights * scale))
    # three weights rounded once more each
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_classes_of_weight_zero_take_no_part(dtype):
    """Not even with a probability of exactly 0 or with all of it: values and gradients stay finite, and right."""
    logits = torch.tensor([[0.0, 1.0, 300.0], [0.0, 1.0, -300.0], [0.0, 1.0, -math.inf]], dtype=dtype).requires_grad_()
    value = ClassifierMixture(as_logits, [0.5, 0.5, 0.0])(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    base = math.log(0.5 * (1 + math.e))
    expected = [base - 300.0, base - math.log(1 + math.e), base - math.log(1 + math.e)]
    # 300 − log … is held to eps · 300
    torch.testing.assert_close(value, torch.tensor(expected, dtype=dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    s = math.e / (1 + math.e)  # ∂/∂ℓ_j = w_j p_j / Σ w p − p_j
    by_hand = torch.tensor([[1 - s, s, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    # exponentials of log-probabilities near 300, held to eps · 300
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=300 * torch.finfo(dtype).eps)


def test_small_probabilities_do_not_underflow():
    value = ClassifierMixture(as_logits, [1.0, 1e-30, 0.0])(torch.tensor([[-500.0, 0.0, 500.0]]))
    # p = (e^-1000, e^-500, 1), both 0 in float32: log(1e-30 e^-500) decides; float32 holds 570 to 3e-5
    torch.testing.assert_close(value.item(), -500 + math.log(1e-30), rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0], []])
def test_weights_that_cannot_be_used(weights):
    with pytest.raises(mfm.InputError, match="finite and >= 0 and not all 0"):
        ClassifierMixture(classifier, weights)


def test_weights_of_another_shape():
    with pytest.raises(mfm.InputError, match="one number a class"):
        ClassifierMixture(classifier, torch.eye(4))
    with pytest.raises(mfm.InputError, match="knows 4 classes and there are 3 weights: give one weight a class"):
        ClassifierMixture(classifier, torch.ones(3))(X)


# -- margin ----------------------------------------------------------------------------------------------------------


def test_margin_is_the_log_odds():
    for label in range(4):
        expected = [0.7 * math.log(p[label] / (1 - p[label])) for p in probabilities(X)]
        value = LogitMargin(classifier, label, strength=0.7)(X)
        # 1 − p is formed from p down to 0.004: a rounding there is magnified 250 times
        torch.testing.assert_close(value, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)


def test_margin_goes_on_where_the_log_probability_stops():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    slopes = [
        torch.autograd.grad(reward(logits).sum(), logits)[0][0, 0].item()
        for reward in (ClassifierMixture(as_logits, [1.0, 0.0]), LogitMargin(as_logits, 0))
    ]
    assert slopes == [0.0, 1.0]
    assert LogitMargin(as_logits, 0)(logits).item() == 200.0


@pytest.mark.parametrize("label", [-1, 1.0, "cat", None, torch.tensor([1, 2])])
def test_labels_that_are_none(label):
    with pytest.raises(mfm.InputError, match="label must be the number of a class"):
        LogitMargin(classifier, label)


def test_labels_out_of_range():
    with pytest.raises(mfm.InputError, match=r"label 4 is not among 0 … 3"):
        LogitMargin(classifier, 4)(X)
    with pytest.raises(mfm.InputError, match=r"label 12 is not among 0 … 9"):  # which knows its classes: at once
        LogitMargin(load_classifier("digits-guide"), 12)
    with pytest.raises(mfm.InputError, match="add a column of zeros"):
        LogitMargin(lambda x: x[:, :1], 0)(X)
    assert torch.equal(LogitMargin(classifier, torch.tensor(2))(X), LogitMargin(classifier, 2)(X))


# -- both ------------------------------------------------------------------------------------------------------------

MAKERS = {
    "mixture": lambda net: ClassifierMixture(net, torch.ones(3)),
    "margin": lambda net: LogitMargin(net, 1),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def test_training_mode_is_refused_and_left_alone(make):
    with torch.random.fork_rng():  # weights come from torch's initialiser
        net = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    with pytest.raises(mfm.InputError, match=r"Sequential is in training mode.*call \.eval\(\)"):
        make(net)
    assert net.training
    reward = make(net.eval())
    assert reward(normal(5, 2, dtype=torch.float32)).shape == (5,)
    net.train()
    with pytest.raises(mfm.InputError, match=r"call \.eval\(\)"):
        reward(normal(5, 2, dtype=torch.float32))
    assert net.training


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:, 0], r"logits of shape \(5, classes\), got torch.float64 \(5,\)"),
        (lambda x: x[:3], r"logits of shape \(5, classes\), got torch.float64 \(3, 2\)"),
        (lambda x: x.argmax(1, keepdim=True), r"floating-point logits .* got torch.int64"),
        (lambda x: (x, None), r"got tuple; unwrap it"),
    ],
)
def test_what_is_not_logits(make, bad, message):
    with pytest.raises(mfm.InputError, match=message):
        make(bad)(X)


def test_a_classifier_in_another_precision(make):
    assert make(lambda x: classifier(x.float())[:, :3])(X).dtype == F64


def test_a_classifier_is_needed(make):
    with pytest.raises(mfm.InputError, match="classifier must be a function of x that returns logits, got 'resnet'"):
        make("resnet")


def test_they_print_what_they_are():
    shown = [repr(r) for r in (ClassifierMixture(classifier, [0, 3, 1, 0], 2.0), LogitMargin(nn.Identity().eval(), 1))]
    assert shown == [
        "ClassifierMixture(classifier, weights={1: 0.75, 2: 0.25} of 4 classes, strength=2)",
        "LogitMargin(Identity, label=1, strength=1)",
    ]
