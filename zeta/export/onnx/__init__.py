"""zeta models as ONNX: `dense` is the model on a batch of one size, `format` writes it.

Imports `zeta.models` and the export room; onnxscript and onnxruntime, which are extras, inside.
"""
