"""Images in, segmentations out: bundles, preprocessing and the SparseRefine pipeline."""
