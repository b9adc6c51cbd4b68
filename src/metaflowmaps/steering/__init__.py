"""Steering: inference-time alignment. ``steer`` is the entry; each method has its file."""

from metaflowmaps.steering.run import METHODS, SteeringFailed, SteerResult, Step, steer

__all__ = ["METHODS", "SteerResult", "SteeringFailed", "Step", "steer"]
