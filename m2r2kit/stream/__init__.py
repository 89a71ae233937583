"""The paper's idea: an accelerated residual stream p beside the model's own h, and how it is trained."""
