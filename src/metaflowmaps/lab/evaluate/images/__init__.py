"""Experiments on images: each module measures one question about a map and returns figures as data and pictures."""
