"""Activation sparsity: which inputs of a linear map a token reads."""
