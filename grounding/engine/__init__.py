"""Run models and compute the maps: plan, forward passes, explanations, layers."""
