"""Full-resolution semantic masks for ROS 2 cameras: dense low resolution plus sparse high-resolution refinement."""

__version__ = "0.1.0"
