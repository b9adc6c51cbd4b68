"""Pictures of a story are the map's own: a draw is a function of its seed, one noise is in all times."""

import torch

from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.story import Story, as_bytes, keep_story, noised_and_drawn, read_story
from metaflowmaps.random import RowNoise


def test_draws_of_a_story_are_those_of_their_seeds_for_one_noise_at_every_time(tmp_path):
    model = MetaFlowMap.from_pretrained("digits")
    images = torch.rand(2, *model.event_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    told, pictures = noised_and_drawn(model, images, 0, "What it may be")
    noisy, draws = pictures["noisy"], pictures["draws"]
    for t, x_t in zip(told.times, noisy, strict=True):  # noisy[0] is the noise itself
        torch.testing.assert_close(x_t, model.path.interpolate(noisy[0], images, t))
    for image in range(2):
        for draw in (2, 3):
            alone = RowNoise(torch.tensor(told.seeds[draw : draw + 1]), "posterior").normal(model.event_shape)
            with torch.no_grad():
                again = model.push(alone, told.times[4], noisy[4][image : image + 1])
            # other rows beside it: rounding
            torch.testing.assert_close(draws[4, image, draw : draw + 1], again, atol=1e-4, rtol=0)

    story, kept = read_story({"story": keep_story(Story(posterior=told), pictures, tmp_path)}, tmp_path)
    assert story.posterior == told
    assert torch.equal(kept["draws"], as_bytes(draws))


def test_bytes_of_pictures_clip_and_turn_what_is_no_number_grey():
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, torch.nan])
    assert as_bytes(x).tolist() == [0, 0, 128, 255, 255, 128]
