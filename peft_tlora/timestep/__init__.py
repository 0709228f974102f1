"""The way of a timestep from whoever knows it to the layers whose ranks it masks.

A hook (`hooks`) or a wrapped function of a host (`functions`) reads it, by what is known of the
denoiser's class (`denoisers`); the state of the denoiser (`state`) holds it while that forward
runs, and finds it again for a recomputation (`recomputation`).
"""
