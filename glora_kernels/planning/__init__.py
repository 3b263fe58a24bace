"""What a call will cost on a machine, and which strategy and tiles the Triton backend takes. Loads no Triton."""
