"""Rewards that look at pictures: preference models, CLIP, classifiers. Who uses them downloads their weights."""

from metaflowmaps.rewards.vision.aesthetic import AestheticScore
from metaflowmaps.rewards.vision.clip import ClipScore, HPSv2, PickScore
from metaflowmaps.rewards.vision.image_classifier import ImageClassifierReward
from metaflowmaps.rewards.vision.image_reward import ImageReward, ImageRewardNetwork
from metaflowmaps.rewards.vision.imagenet_classifier import ImageNetClassifier
from metaflowmaps.rewards.vision.ocr import OCR
from metaflowmaps.rewards.vision.picture_reward import PictureReward
from metaflowmaps.rewards.vision.pixels import Pixels

__all__ = [
    "OCR",
    "AestheticScore",
    "ClipScore",
    "HPSv2",
    "ImageClassifierReward",
    "ImageNetClassifier",
    "ImageReward",
    "ImageRewardNetwork",
    "PickScore",
    "PictureReward",
    "Pixels",
]
