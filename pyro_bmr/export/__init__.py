"""Plain torch modules, ONNX and costs of what a reduction left."""
