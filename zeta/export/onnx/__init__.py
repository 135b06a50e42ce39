"""zeta's models as ONNX: `dense` is the model on a batch of one size, `format` writes it."""
