"""In-place work on modules: finding blocks, patching, detecting changes."""
