"""Components outside of the denoiser: owned by one rank, or encoders split by layer."""
