"""Fault injection: plans, engines, campaigns and their statistics, for any torch.nn.Module."""
