"""GLAD: global and local adaptive diffusion for unsupervised anomaly detection (Yao et al., ECCV 2024)."""
