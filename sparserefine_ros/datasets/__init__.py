"""Frames to learn from and to measure on: CamVid, the procedural street."""
