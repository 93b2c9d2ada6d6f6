"""Group normalisation (Wu & He 2018, https://arxiv.org/abs/1803.08494) that is exact for channels_last on a CPU too.

For that memory format torch's CPU kernel takes the variance as the mean of squares less the square of the mean, of sums
added up one by one in float32. With the 4 million elements that a VAE has in a group it is off by 2e-4 of a deviation;
where the mean is ten deviations, by 6e-3; where it is a hundred, by anything. So the moments of the channels are taken
here, as torch's batch normalisation takes them in training: the mean, then the variance around it. They are joined in
float64, over strips short enough for sums in float32: where the mean is a hundred deviations, they are off by 2e-5 of
one. The rest is batch normalisation, too, which with the moments of a group is group normalisation. Small pictures are
copied to the format that torch's kernel is exact for; with large ones that would take far longer.

Shapes: C channels, H W height and width, L = H * W, S strips, G groups, K = C / G channels of a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

_STRIP_ROWS = 1024
_FEW_ELEMENTS = 2**16  # of a picture; up to them a copy costs less than the moments' many small operations


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, exact in every memory format: [B, C, H, W] -> [B, C, H, W], in the format of the input."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if x[0].numel() <= _FEW_ELEMENTS:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        for picture, normed in zip(torch.split(x, 1), torch.split(out, 1), strict=True):
            self._norm(picture, normed)
        return out

    def _norm(self, x: Tensor, out: Tensor) -> None:
        mean_C, variance_C = (
            moment_G.repeat_interleave(self.num_channels // self.num_groups).float()
            for moment_G in group_moments(x, self.num_groups)
        )
        # F.batch_norm, but for `out`: joining the pictures afterwards would cost as much again.
        unused = torch.empty(0)
        affine = (self.weight.float(), self.bias.float())
        torch.native_batch_norm(
            x, *affine, mean_C, variance_C, training=False, momentum=0.0, eps=self.eps, out=(out, unused, unused)
        )


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [G], float64, of the groups of one channels_last picture [1, C, H, W]."""
    x_LC = x.permute(0, 2, 3, 1).flatten(0, 2)
    length, channels = x_LC.shape
    strips = torch.split(x_LC, _STRIP_ROWS)
    running = torch.zeros(channels)  # left as it is; in float32, as the moments shall be
    moments = [torch.batch_norm_update_stats(strip, running, running, momentum=0.0) for strip in strips]
    mean_SGK, variance_SGK = (
        torch.stack(of_strips).double().view(len(strips), groups, -1) for of_strips in zip(*moments, strict=True)
    )
    share_S11 = torch.tensor([len(strip) / length for strip in strips], dtype=torch.float64).view(-1, 1, 1)
    mean_G = (share_S11 * mean_SGK).sum(0).mean(1)
    variance_SGK += (mean_SGK - mean_G[:, None]).square()
    return mean_G, (share_S11 * variance_SGK).sum(0).mean(1)
