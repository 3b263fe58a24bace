"""What a call will cost on a machine, and which strategy and tiles the Triton backend uses. Loads no Triton."""
