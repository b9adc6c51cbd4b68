"""A typo in a keyword points to the right name, from Python as on the command line."""

import pytest
import torch

import metaflowmaps as mfm

MODEL = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture(torch.zeros(1, 2), 1.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mfm.MFMGF(num_draw=3), "unknown option of MFMGF 'num_draw': did you mean 'num_draws'?"),
        (lambda: mfm.ODE(stesp=3), "did you mean 'steps'?"),
        (lambda: mfm.Gradient(pases=2), "did you mean 'passes'?"),
        (lambda: mfm.value_gradient(MODEL, sum, 0.3, torch.zeros(1, 2), 4, seed=0), "did you mean 'generator'?"),
        (lambda: mfm.steer(MODEL, sum, 4, generator=None), "did you mean 'seed'?"),
        (lambda: mfm.steer(MODEL, sum, 4, lable=None), "allowed are batch_size, callback, cond"),
        (lambda: mfm.advise(MODEL, sum, budgte=3), "did you mean 'budget'?"),
        (lambda: mfm.MetaFlowMap.from_pretrained("digits").generate(4, seed=3), "did you mean 'generator'?"),
        (lambda: mfm.MetaFlowMap.from_pretrained("digits").draw(0.3, None, num_draw=3), "did you mean 'num_draws'?"),
    ],
)
def test_a_wrong_keyword_points_to_the_right_one(call, says: str):
    with pytest.raises(mfm.InputError) as caught:
        call()
    assert says in str(caught.value)


def test_a_wrong_keyword_is_a_type_error_as_elsewhere():
    with pytest.raises(TypeError):
        mfm.MFMGF(num_draw=3)
