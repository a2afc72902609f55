"""Training: configuration, the loop, distillation, optimisation, metrics, checkpoints and reports."""
