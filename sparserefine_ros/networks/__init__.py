"""Torch modules, no input or output: dense segmenters and the sparse refiner."""
