"""What knows diffusers pipelines."""
