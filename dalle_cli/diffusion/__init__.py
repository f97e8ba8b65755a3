"""Schedules, parameterizations, losses and samplers of diffusion: functions over a denoiser."""
