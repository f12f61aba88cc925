"""`export`: the item encoder as an ONNX file, and what runs it without torch."""
