"""Operations on tensors, one file for each: checked, sent to a backend, and differentiable."""
