"""Weights in four or eight bits: code books, block scales, and the linear map that dequantizes on the fly."""
