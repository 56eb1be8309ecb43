"""Mode fx: a symbolic trace, prepared and converted by PyTorch's FX passes."""
