"""Data of a run of training: images, clips and captions become sized samples in an order that the step decides."""
