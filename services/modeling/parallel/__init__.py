"""One network on several ranks: each a process with a device, which exchange tensors over torch.distributed."""
