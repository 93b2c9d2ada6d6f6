"""A denoiser on several devices: one process a rank, started and watched by the service, which is no rank itself."""
