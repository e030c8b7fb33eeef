"""AAM-Softmax, SupCon and their weighted sum, on plain tensors: the caller gathers the batch of all workers first.

Every loss normalises its embeddings to unit length and is computed in float32, or float64 where it is given that,
also under autocast: a cosine of 8 bits divided by a temperature of 0.03 is noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysv.config import LossConfig
from raysv.precision import at_least_float32


class Losses(NamedTuple):
    """What a batch costs; scalars, of which only `total` is meant for the backward pass."""

    total: Tensor
    aam: Tensor
    supcon: Tensor
    accuracy: Tensor


def supcon_loss(embeddings: Tensor, speakers: Tensor, temperature: float, margin: float = 0.0) -> Tensor:
    """Supervised contrastive loss: pull the views of a speaker together, push others away.

    The mean is over all anchors, one per view. An anchor without a positive (one view of a speaker seen once) counts
    in that mean and adds nothing to it; without any positive the loss and its gradient are zero. The temperature
    sets how hard pairs weigh, not how much the loss does: the common factor τ/0.07 is left out.

    Args:
        embeddings: `(batch, views, dim)`, of any length.
        speakers: `(batch,)` integer labels; equal labels are positives.
        temperature: divides the cosines; smaller weighs hard pairs more.
        margin: taken from the cosines of positives, above and below the fraction bar.

    Returns: a scalar. Memory grows with `(batch · views)²`.
    Source: Khosla et al. 2020, arXiv 2004.11362, eq. 2; for speakers, arXiv 2210.16636. The margin is that of the
        public code of arXiv 2210.16622, whose text puts one on the angle, and only above the bar.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _unit(embeddings.flatten(0, 1))
        labels = speakers.repeat_interleave(embeddings.shape[1])
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        positives = (labels[:, None] == labels) & ~itself
        cosines = unit @ unit.T
        if margin:
            cosines = torch.where(positives, cosines - margin, cosines)
        log_share = (cosines / temperature).masked_fill(itself, -math.inf).log_softmax(1)
        # where, not a product: on the diagonal it would be 0 · −∞
        attraction = torch.where(positives, log_share, 0.0).sum(1) / positives.sum(1).clamp(min=1)
        return -attraction.mean()


class AAMSoftmax(nn.Module):
    """Additive angular margin softmax: classify speakers, with the own speaker's angle made larger by a margin.

    Cross-entropy of `scale · c`, where c are the cosines between an embedding and each class weight, and the own
    class's cos θ is replaced by cos(θ + margin). Where θ + margin exceeds π, that would fall as the angle grows, so a
    line takes over. Published code has two: `mm`, cos θ − margin · sin margin, the usual one, and `mmm`,
    cos θ − (1 − cos margin), which makes no jump.

    Args:
        margin: radians; the attribute may be changed between steps.
        scale: multiplies the cosines.
        fallback: `mm` or `mmm`, as above.

    Source: Deng et al. 2019, arXiv 1801.07698.
    """

    def __init__(
        self, num_speakers: int, embedding_dim: int, margin: float, scale: float, fallback: str = "mm"
    ) -> None:
        super().__init__()
        if fallback not in ("mm", "mmm"):
            raise ValueError(f"fallback must be mm or mmm, got {fallback!r}.")
        self.margin = margin
        self.scale = scale
        self.fallback = fallback
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_speakers, embedding_dim)))

    def forward(self, embeddings: Tensor, speakers: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and accuracy of embeddings `(n, dim)` whose speakers are `(n,)`, below `num_speakers`.

        The accuracy is the share of embeddings closest to their own class weight, without the margin.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            unit, weight = _unit(embeddings), F.normalize(at_least_float32(self.weight), dim=1)
            cosines = unit @ weight.T
            own = cosines.gather(1, speakers[:, None])
            # The distance to the class's axis is sin θ. Unlike √(1 − cos²), it is exact for small angles and has a
            # bounded gradient where an embedding meets its class weight, zero at the very point.
            sine = torch.linalg.vector_norm(unit - own * weight[speakers], dim=1, keepdim=True)
            widened = own * math.cos(self.margin) - sine * math.sin(self.margin)
            drop = self.margin * math.sin(self.margin) if self.fallback == "mm" else 1 - math.cos(self.margin)
            target = torch.where(own >= -math.cos(self.margin), widened, own - drop)
            loss = F.cross_entropy(self.scale * cosines.scatter(1, speakers[:, None], target), speakers)
            return loss, (cosines.detach().argmax(1) == speakers).float().mean()


class AAMSupCon(nn.Module):
    """AAM-Softmax plus `contrast_weight` times SupCon, or one of them alone.

    Args:
        config: which terms; margin, scale and fall-back of AAM-Softmax and which views it classifies; temperature,
            margin and weight of the contrast.
        num_speakers: speakers of the training list, which the data tell.
        embedding_dim: length of an embedding.

    Source: arXiv 2210.16636.
    """

    def __init__(self, config: LossConfig, num_speakers: int, embedding_dim: int) -> None:
        super().__init__()
        self.config = config
        self.aam = (
            AAMSoftmax(num_speakers, embedding_dim, config.margin, config.scale, config.fallback)
            if config.classifies
            else None
        )

    @property
    def margin(self) -> float:
        """The margin of AAM-Softmax in radians, which a schedule may set between steps; 0 without that term."""
        return self.aam.margin if self.aam else 0.0

    @margin.setter
    def margin(self, margin: float) -> None:
        if self.aam:
            self.aam.margin = margin

    def forward(self, embeddings: Tensor, speakers: Tensor) -> Losses:
        """The losses of embeddings `(batch, views, dim)` whose speakers are `(batch,)`.

        The accuracy is AAM's; without that term, the share of views that are closest to another of their speaker.
        """
        config = self.config
        supcon = embeddings.new_zeros(())
        if config.contrasts:
            supcon = supcon_loss(embeddings, speakers, config.temperature, config.contrast_margin)
        if self.aam is None:
            return Losses(supcon, supcon.new_zeros(()), supcon, nearest_accuracy(embeddings, speakers))
        classified = embeddings if config.aam_views == "all" else embeddings[:, :1]
        aam, accuracy = self.aam(classified.flatten(0, 1), speakers.repeat_interleave(classified.shape[1]))
        total = aam + config.contrast_weight * supcon if config.contrasts else aam
        return Losses(total, aam, supcon.to(aam.dtype), accuracy)


@torch.no_grad()
def nearest_accuracy(embeddings: Tensor, speakers: Tensor) -> Tensor:
    """Of views `(batch, views, dim)` of speakers `(batch,)`, the share whose nearest other view is of their speaker."""
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _unit(embeddings.flatten(0, 1))
        nearest = (unit @ unit.T).fill_diagonal_(-math.inf).argmax(1)
    labels = speakers.repeat_interleave(embeddings.shape[1])
    return (labels[nearest] == labels).float().mean()


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length one, however short or long they were; zeros, without a direction, stay and get no gradient."""
    values = at_least_float32(vectors)
    # Length is about to be lost anyway: scaled first, the squares of the entries neither vanish nor overflow.
    largest = values.detach().abs().amax(-1, keepdim=True)
    return F.normalize(values / largest.masked_fill(largest == 0, math.inf), dim=-1)
