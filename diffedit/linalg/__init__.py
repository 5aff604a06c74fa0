"""The mathematics, free of any model: tensors in, factors out."""
