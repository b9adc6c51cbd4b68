"""Measuring a model: posterior fidelity now; a result is data, commands print and draw it."""
